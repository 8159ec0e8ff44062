"""Durable bytes under keys: local disk, object storage, memory. Knows nothing of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from storage.store import Buffer, Data, ObjectInfo, Store

if TYPE_CHECKING:
    from storage.open import open_store, redact

__all__ = ["Buffer", "Data", "ObjectInfo", "Store", "open_store", "redact"]


def __getattr__(name: str) -> object:
    # The keeper starts in a fifth of a second: what opens stores is imported when it is asked for.
    if name in ("open_store", "redact"):
        import storage.open

        return getattr(storage.open, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
