"""A store in this process's memory, for tests and trials."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from storage.errors import KeyExists, KeyMissing, RangeMissing, TooLarge
from storage.store import Data, ObjectInfo, Store, check_key, check_prefix, pieces, same_bytes


class MemoryStore(Store):
    """A dictionary. Conditional among the threads of this process, which are all that can see it.

    A forked child has a copy of its own, and nothing survives the process.
    """

    conditional = True

    def __init__(self, name: str = "") -> None:
        self.url = f"memory://{name}"
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object, see Store.get."""
        data = self._find(key)
        if max_bytes is not None and len(data) > max_bytes:
            raise TooLarge(f"{len(data)} bytes, at most {max_bytes} were expected", where=f"{self.url}/{key}")
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly these bytes, see Store.get_range."""
        data = self._find(key)
        if start < 0 or length < 0 or start + length > len(data):
            raise RangeMissing(f"{length} bytes at {start}, but the object has {len(data)}", where=f"{self.url}/{key}")
        return data[start : start + length]

    def size(self, key: str) -> int:
        """Bytes of the object, see Store.size."""
        return len(self._find(key))

    def put(self, key: str, data: Data) -> None:
        """Replace the object, see Store.put."""
        check_key(key)
        whole = b"".join(pieces(data))
        with self._lock:
            self._objects[key] = whole

    def put_if_absent(self, key: str, data: Data) -> None:
        """Create the object, see Store.put_if_absent."""
        check_key(key)
        whole = b"".join(pieces(data))
        with self._lock:
            existing = self._objects.setdefault(key, whole)
        if existing is not whole and not same_bytes(existing, whole):
            raise KeyExists("the key holds other bytes already", where=f"{self.url}/{key}")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in ascending order of key, as they were at the call."""
        check_prefix(prefix)
        with self._lock:
            found = sorted((key, len(data)) for key, data in self._objects.items() if key.startswith(prefix))
        return iter([ObjectInfo(key=key, size=size) for key, size in found])

    def delete(self, key: str) -> None:
        """Remove the object, see Store.delete."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def _find(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            data = self._objects.get(key)
        if data is None:
            raise KeyMissing("there is no such object", where=f"{self.url}/{key}", next="check the key")
        return data
