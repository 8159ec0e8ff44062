"""Directories under one root: walked without following links, created durably."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Sequence

from storage.errors import StoreDenied

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_KNOWN = 64
_NOT_PRUNED = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM})
_UNSYNCABLE = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def sync_directory(descriptor: int) -> None:
    """Put a directory's entries on disk. A medium that cannot sync directories at all is taken as it is."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCABLE:
            raise


class Directories:
    """Opens directories below `root`, one segment at a time.

    A symbolic link below the root is refused (StoreDenied): whoever can place one could make a reader leave the
    root. The root itself may be a link, it is the user's choice. Every other failure is an OSError.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        # Directories whose own entry is known to be on disk. Each holds a descriptor, so that its inode number
        # cannot be given to another directory made at the same path after this one was removed.
        self._known: OrderedDict[tuple[str, ...], tuple[int, int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, segments: Sequence[str]) -> int:
        """A descriptor of the directory, to be closed by the caller. Raises FileNotFoundError, NotADirectoryError."""
        here = os.open(self.root, _DIRECTORY)
        for segment in segments:
            try:
                below = self._enter(here, segment)
            finally:
                os.close(here)
            here = below
        return here

    def open_durable(self, segments: Sequence[str]) -> int:
        """As `open`, but creates what is missing and returns only when every entry down to it is on disk.

        FileNotFoundError means that someone removed a directory meanwhile: begin again.
        """
        here = self._open_root_durable()
        path: tuple[str, ...] = ()
        for segment in segments:
            path = (*path, segment)
            try:
                try:
                    below = self._enter(here, segment)
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(segment, dir_fd=here)
                    below = self._enter(here, segment)
                try:
                    # Also when another process made it: that process may have died before it synced.
                    if not self._is_known(path, below):
                        sync_directory(here)
                        self._remember(path, below)
                except OSError:
                    os.close(below)
                    raise
            finally:
                os.close(here)
            here = below
        return here

    def prune(self, segments: Sequence[str]) -> None:
        """Remove this directory if it is empty, then its parent, and so on; never the root."""
        for depth in range(len(segments), 0, -1):
            parent = self.open(segments[: depth - 1])
            try:
                os.rmdir(segments[depth - 1], dir_fd=parent)
            except OSError as error:
                if error.errno in _NOT_PRUNED:
                    return
                raise
            finally:
                os.close(parent)

    def close(self) -> None:
        """Give back the descriptors."""
        with self._lock:
            for descriptor, _, _ in self._known.values():
                os.close(descriptor)
            self._known.clear()

    def _enter(self, here: int, segment: str) -> int:
        try:
            return os.open(segment, _DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
        except NotADirectoryError:
            mode = os.stat(segment, dir_fd=here, follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise StoreDenied(
                    f"{segment!r} is a symbolic link inside the store, which could lead out of it",
                    where=self.root,
                    next="put the store's root where the link points to; the root itself may be a link",
                ) from None
            raise

    def _open_root_durable(self) -> int:
        try:
            here = os.open(self.root, _DIRECTORY)
        except FileNotFoundError:
            self._make_root()
            here = os.open(self.root, _DIRECTORY)
        try:
            if not self._is_known((), here):
                # Without the right to read the parent its entries cannot be synced; then others made the root.
                with contextlib.suppress(PermissionError):
                    self._sync_parent(self.root)
                self._remember((), here)
        except OSError:
            os.close(here)
            raise
        return here

    def _make_root(self) -> None:
        missing = []
        path = self.root
        while not os.path.isdir(path):  # noqa: PTH112  (strings throughout: this is the lowest level)
            missing.append(path)
            parent = os.path.dirname(path)  # noqa: PTH120
            if parent == path:
                break
            path = parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)  # noqa: PTH102
            self._sync_parent(path)

    @staticmethod
    def _sync_parent(path: str) -> None:
        parent = os.open(os.path.dirname(path) or "/", _DIRECTORY)  # noqa: PTH120
        try:
            sync_directory(parent)
        finally:
            os.close(parent)

    def _is_known(self, path: tuple[str, ...], descriptor: int) -> bool:
        status = os.fstat(descriptor)
        with self._lock:
            held = self._known.get(path)
            if held is None or held[1:] != (status.st_dev, status.st_ino):
                return False
            self._known.move_to_end(path)
            return True

    def _remember(self, path: tuple[str, ...], descriptor: int) -> None:
        status = os.fstat(descriptor)
        held = os.dup(descriptor)
        stale = []
        with self._lock:
            before = self._known.pop(path, None)
            if before is not None:
                stale.append(before[0])
            self._known[path] = (held, status.st_dev, status.st_ino)
            while len(self._known) > _MAX_KNOWN:
                stale.append(self._known.popitem(last=False)[1][0])
        for each in stale:
            os.close(each)
