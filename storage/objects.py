"""A store on any file system that fsspec knows, for one writer at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from storage.errors import KeyExists, KeyMissing, OutcomeUnknown, RangeMissing, StoreFailed, StoreUnavailable, TooLarge
from storage.posix_errors import typed
from storage.store import Data, ObjectInfo, Store, check_key, check_prefix, is_key, pieces, same_bytes
from storage.url import redact, split


class ObjectStore(Store):
    """Whole objects through fsspec's common operations. S3 has a store of its own, storage.s3.

    What is weaker than the contract, because fsspec promises no more: put_if_absent looks and then writes, so it is
    safe for a single writer only (`conditional` is false, and shared writing is refused); a put that is interrupted
    may leave a part of the object where the file system is not an object store; deadlines are the file system's own.
    """

    conditional = False

    def __init__(self, url: str, storage_options: Mapping[str, object] | None = None) -> None:
        self.url = redact(url).rstrip("/")
        self._given_url, self._options = url, dict(storage_options or {})
        self._opened: tuple[int, Any, str] | None = None  # (process, file system, root path)
        split(url)

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object, see Store.get."""
        size = self.size(key)
        if max_bytes is not None and size > max_bytes:
            raise TooLarge(f"{size} bytes, at most {max_bytes} were expected", where=self._where(key))
        with self._errors(key, writing=False):
            system, path = self._at(key)
            return bytes(system.cat_file(path))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly these bytes, see Store.get_range."""
        size = self.size(key)
        if start < 0 or length < 0 or start + length > size:
            raise RangeMissing(f"{length} bytes at {start}, but the object has {size}", where=self._where(key))
        if not length:
            return b""
        with self._errors(key, writing=False):
            system, path = self._at(key)
            data = bytes(system.cat_file(path, start=start, end=start + length))
        if len(data) != length:
            raise RangeMissing(f"{len(data)} of {length} bytes at {start}", where=self._where(key))
        return data

    def size(self, key: str) -> int:
        """Bytes of the object, see Store.size."""
        with self._errors(key, writing=False):
            system, path = self._at(key)
            info = system.info(path)
        if info.get("type") != "file":
            raise KeyMissing("there is no such object", where=self._where(key), next="check the key")
        return int(info["size"])

    def put(self, key: str, data: Data) -> None:
        """Replace the object, see Store.put and this class."""
        body = data if isinstance(data, bytes) else b"".join(pieces(data))
        with self._errors(key, writing=True):
            system, path = self._at(key)
            try:
                system.pipe_file(path, body)
            except FileNotFoundError:
                system.makedirs(path.rpartition("/")[0], exist_ok=True)
                system.pipe_file(path, body)

    def put_if_absent(self, key: str, data: Data) -> None:
        """Create the object, for a single writer: see this class."""
        try:
            existing = self.get(key, max_bytes=sum(view.nbytes for view in pieces(data)))
        except KeyMissing:
            self.put(key, data)
            return
        except TooLarge:
            existing = None
        if existing is None or not same_bytes(existing, data):
            raise KeyExists("the key holds other bytes already", where=self._where(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in ascending order of key, as they were at the call."""
        check_prefix(prefix)
        with self._errors(prefix, writing=False):
            system, root = self._system()
            above = prefix.rpartition("/")[0]
            try:
                found = system.find(f"{root}/{above}".rstrip("/"), detail=True)
            except FileNotFoundError:
                found = {}
        keys = ((path.removeprefix(root).lstrip("/"), int(info["size"])) for path, info in found.items())
        return iter(
            [ObjectInfo(key=key, size=size) for key, size in sorted(keys) if key.startswith(prefix) and is_key(key)]
        )

    def delete(self, key: str) -> None:
        """Remove the object, see Store.delete."""
        with self._errors(key, writing=True), contextlib.suppress(FileNotFoundError, IsADirectoryError):
            system, path = self._at(key)
            system.rm_file(path)

    def close(self) -> None:
        """Give back the connections."""
        self._opened = None

    def _at(self, key: str) -> tuple[Any, str]:
        system, root = self._system()
        return system, f"{root}/{check_key(key)}"

    def _system(self) -> tuple[Any, str]:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():  # a forked child must not use its parent's connections
            opened = self._opened = (os.getpid(), *_open_system(self._given_url, self._options, self.url))
        return opened[1], opened[2]

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            found = typed(error, self._where(key))
            if writing and isinstance(found, StoreUnavailable):
                raise OutcomeUnknown(found.what, where=found.where, next="repeat it with the same bytes") from None
            raise found from None


def _open_system(url: str, options: Mapping[str, object], shown: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(
            url, **{**options, "use_listings_cache": False, "skip_instance_cache": True}
        )
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise StoreFailed(
            f"fsspec cannot open this address ({type(error).__name__})",
            where=shown,
            next="install the package for this kind of address, and check storage_options",
        ) from None
    return system, str(path).rstrip("/")
