"""A store on a local disk (or a mounted one), durable against loss of power."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from storage import files
from storage.directories import Directories, sync_directory
from storage.errors import (
    KeyExists,
    KeyInvalid,
    KeyMissing,
    OutcomeUnknown,
    RangeMissing,
    StoreFailed,
    StoreUnavailable,
    StoreUnsupported,
    TooLarge,
)
from storage.failpoint import failpoint
from storage.posix_errors import typed
from storage.store import Data, ObjectInfo, Store, check_key, check_prefix, pieces
from storage.sweep import sweep
from storage.temporary import new_name
from storage.walk import walk

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a planted FIFO must not block the open
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS = 8


class LocalStore(Store):
    """Files under a root directory, which is created at the first put.

    A put writes a hidden temporary file in the directory of its key, syncs it, gives it its name by link(2) (which
    never overwrites) or rename(2), and syncs the directory; directories that it creates are synced up to the root.
    A file or directory whose fsync failed is never synced again: the kernel may have dropped the pages and would
    report success. One call may take as long as the kernel takes: a hung disk cannot be interrupted.

    Failpoints: local.written, local.synced, local.named.
    """

    conditional = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.url = str(Path(root).expanduser().absolute())
        if Path(self.url).exists() and not Path(self.url).is_dir():
            raise StoreFailed("this is a file, not a folder", where=self.url, next="name a folder for the run")
        self._directories = Directories(self.url)
        self._failed: set[tuple[str, ...]] = set()

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object, see Store.get."""
        with self._errors(key), self._opened(key) as (file, size):
            if max_bytes is not None and size > max_bytes:
                raise TooLarge(f"{size} bytes, at most {max_bytes} were expected", where=self._where(key))
            return self._whole(files.read(file, 0, size), size, key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly these bytes, see Store.get_range."""
        with self._errors(key), self._opened(key) as (file, size):
            self._check_range(key, start, length, size)
            return self._whole(files.read(file, start, length), length, key)

    def get_into(self, key: str, start: int, out: memoryview) -> None:
        """The bytes read straight into `out`, see Store.get_into."""
        with self._errors(key), self._opened(key) as (file, size):
            self._check_range(key, start, out.nbytes, size)
            if out.nbytes and files.read_into(file, start, out.cast("B")) != out.nbytes:
                self._whole(b"", out.nbytes, key)

    def size(self, key: str) -> int:
        """Bytes of the object, see Store.size."""
        with self._errors(key), self._opened(key) as (_, size):
            return size

    def put(self, key: str, data: Data) -> None:
        """Replace the object, see Store.put."""
        self._put(key, pieces(data), replace=True)

    def put_if_absent(self, key: str, data: Data) -> None:
        """Create the object, see Store.put_if_absent."""
        self._put(key, pieces(data), replace=False)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in ascending order of key, see Store.list. Files whose names are not keys are left out."""
        *above, start = check_prefix(prefix).split("/")
        return self._listing(prefix, above, start)

    def delete(self, key: str) -> None:
        """Remove the object, and directories that this leaves empty. Not synced: it may come back with a power cut."""
        *above, name = check_key(key).split("/")
        with self._errors(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            directory = self._directories.open(above)
            try:
                with contextlib.suppress(IsADirectoryError):
                    os.unlink(name, dir_fd=directory)
            finally:
                os.close(directory)
            self._directories.prune(above)

    def sweep_temporary(self, *, older_than_s: float) -> int:
        """Remove temporary files of dead writers, see Store.sweep_temporary. Age by the files' own times."""
        with self._errors(""):
            return sweep(self._directories, time.time() - older_than_s)

    def close(self) -> None:
        """Give back descriptors."""
        self._directories.close()

    # ---- reading
    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        *above, name = check_key(key).split("/")
        directory = self._directories.open(above)
        try:
            file = os.open(name, _READ, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise KeyMissing("there is no such object", where=self._where(key), next="check the key")
            yield file, status.st_size
        finally:
            os.close(file)

    def _check_range(self, key: str, start: int, length: int, size: int) -> None:
        if start < 0 or length < 0 or start + length > size:
            raise RangeMissing(f"{length} bytes at {start}, but the object has {size}", where=self._where(key))

    def _listing(self, prefix: str, above: Sequence[str], start: str) -> Iterator[ObjectInfo]:
        with self._errors(prefix):
            yield from walk(self._directories, above, start)

    def _whole(self, data: bytes, length: int, key: str) -> bytes:
        if len(data) != length:
            raise RangeMissing("the file was cut while it was read", where=self._where(key))
        return data

    # ---- writing
    def _put(self, key: str, views: Sequence[memoryview], *, replace: bool) -> None:
        *above, name = check_key(key).split("/")
        if tuple(above) in self._failed or (*above, name) in self._failed:
            raise StoreFailed(
                "an fsync failed here before; what is on disk is unknown",
                where=self._where(key),
                next="check the disk and the kernel's log, then start again, best on another disk",
            )
        for _ in range(_ATTEMPTS):
            # A directory (or the temporary file) can be swept away between two steps: then from the beginning.
            with self._errors(key), contextlib.suppress(FileNotFoundError):
                directory = self._open_for_writing(above, key)
                try:
                    if replace:
                        self._replace(directory, name, views, key)
                    else:
                        self._create(directory, name, views, key)
                    self._sync_named(directory, above, key)
                finally:
                    os.close(directory)
                return
        if not Path(self.url).is_dir():
            raise StoreFailed("the folder does not exist and cannot be made", where=self.url, next="check the path")
        raise StoreUnavailable(
            f"its directory vanished {_ATTEMPTS} times while it was written", where=self._where(key), next="try again"
        )

    def _open_for_writing(self, above: Sequence[str], key: str) -> int:
        try:
            return self._directories.open_durable(above)
        except NotADirectoryError:
            raise KeyInvalid("another object's key is a part of this path", where=self._where(key)) from None
        except OSError as error:
            if error.errno == errno.EIO:
                self._failed.add(tuple(above))
            raise

    def _replace(self, directory: int, name: str, views: Sequence[memoryview], key: str) -> None:
        temporary = new_name()
        try:
            self._write(directory, temporary, views)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except IsADirectoryError:
            raise KeyInvalid("other objects' keys begin with this path", where=self._where(key)) from None
        finally:
            self._unlink(directory, temporary)
        failpoint("local.named")

    def _create(self, directory: int, name: str, views: Sequence[memoryview], key: str) -> None:
        if self._holds_same(directory, name, views, key):
            return
        temporary = new_name()
        try:
            self._write(directory, temporary, views)
            self._link(directory, temporary, name, views, key)
        finally:
            self._unlink(directory, temporary)
        failpoint("local.named")

    def _link(self, directory: int, temporary: str, name: str, views: Sequence[memoryview], key: str) -> None:
        try:
            os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except OSError as error:
            # Over NFS the reply of a link that succeeded can get lost, and the repetition reports an error. Only
            # this call links this temporary file: two names mean that it worked.
            if os.stat(temporary, dir_fd=directory, follow_symlinks=False).st_nlink == 2:
                return
            if error.errno == errno.EEXIST:
                if not self._holds_same(directory, name, views, key):
                    raise FileNotFoundError(errno.ENOENT, "deleted meanwhile") from None
            elif error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise StoreUnsupported(
                    "this file system has no hard links, so put_if_absent cannot be atomic",
                    where=self._where(key),
                    next="use a disk with hard links (ext4, xfs, btrfs, NFS, Lustre) or object storage",
                ) from None
            elif error.errno in (errno.EIO, errno.ETIMEDOUT, errno.EINTR, errno.ESTALE):
                raise OutcomeUnknown("no answer to link", where=self._where(key), next="repeat it") from None
            else:
                raise

    def _write(self, directory: int, temporary: str, views: Sequence[memoryview]) -> None:
        """A new synced file. fsync is called once: after an error its pages may be gone, a second call would lie."""
        file = os.open(temporary, _WRITE, 0o666, dir_fd=directory)
        try:
            files.write_all(file, views)
            failpoint("local.written")
            os.fsync(file)
        finally:
            os.close(file)
        failpoint("local.synced")

    def _holds_same(self, directory: int, name: str, views: Sequence[memoryview], key: str) -> bool:
        """False if there is nothing under the name, True if exactly `views` is. Raises KeyExists otherwise."""
        try:
            file = os.open(name, _READ, dir_fd=directory)
        except FileNotFoundError:
            return False
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise KeyInvalid("other objects' keys begin with this path", where=self._where(key))
            if status.st_size != sum(view.nbytes for view in views) or not files.equals(file, views):
                raise KeyExists("the key holds other bytes already", where=self._where(key))
            # Whoever wrote it may have died before it was on disk; we are about to promise that it is.
            try:
                os.fsync(file)
            except OSError:
                self._failed.add(tuple(key.split("/")))
                raise
        finally:
            os.close(file)
        return True

    def _sync_named(self, directory: int, above: Sequence[str], key: str) -> None:
        try:
            sync_directory(directory)
        except OSError as error:
            self._failed.add(tuple(above))
            raise OutcomeUnknown(
                f"written, but fsync of its directory failed ({errno.errorcode.get(error.errno or 0, '?')})",
                where=self._where(key),
                next="check the disk; the object is visible now but may be lost with a power cut",
            ) from None

    @staticmethod
    def _unlink(directory: int, temporary: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)

    # ---- errors
    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise typed(error, self._where(key)) from error
