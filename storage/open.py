"""From an address to the store behind it."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.store import Store
from storage.url import redact, split

__all__ = ["open_store", "redact"]

_memories: dict[str, MemoryStore] = {}
_lock = threading.Lock()


def open_store(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, object] | None = None,
    *,
    retry: bool = True,
) -> Store:
    """The store at `url`, with passing faults retried unless `retry` is false.

    url              a path or file://... (LocalStore), memory://name (one per name and process), s3://bucket/path,
                     or any other address that fsspec knows
    storage_options  what fsspec is given beside it, as in pandas; may hold secrets, never shown

    Opening reads and writes nothing. Raises StoreFailed for an address that names no store.
    """
    store = _open(os.fspath(url), dict(storage_options or {}))
    if not retry:
        return store
    from storage.retry import RetryingStore

    return RetryingStore(store)


def _open(url: str, storage_options: dict[str, object]) -> Store:
    scheme, rest = split(url)
    if scheme == "file":
        return LocalStore(rest)
    if scheme == "memory":
        with _lock:
            return _memories.setdefault(rest, MemoryStore(rest))
    if scheme in ("s3", "s3a"):
        from storage.s3 import S3Store

        return S3Store(url, storage_options)
    from storage.objects import ObjectStore

    return ObjectStore(url, storage_options)
