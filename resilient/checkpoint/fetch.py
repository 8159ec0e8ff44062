"""Reading an object of a checkpoint: what is gone, cut or changed becomes CheckpointDamaged, naming it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from resilient.checkpoint.document import digest
from resilient.errors import CheckpointDamaged
from storage.errors import KeyMissing, RangeMissing, TooLarge
from storage.store import Store

NEXT = "restore an older step, or put the object back from a copy; `resilient verify` lists all that is damaged"


def place(store: Store, key: str) -> str:
    """Where an object is, for messages."""
    return f"{store.url}/{key}"


@contextlib.contextmanager
def damage(store: Store, key: str) -> Iterator[None]:
    """Turns what a store says of missing bytes, and damage found without a place, into CheckpointDamaged here."""
    try:
        yield
    except KeyMissing as error:
        raise CheckpointDamaged("the object is gone", where=place(store, key), next=NEXT) from error
    except (RangeMissing, TooLarge) as error:
        raise CheckpointDamaged(f"wrong size: {error.what}", where=place(store, key), next=NEXT) from error
    except CheckpointDamaged as error:
        if error.where and error.next:
            raise
        raise CheckpointDamaged(error.what, where=error.where or place(store, key), next=error.next or NEXT) from error


def check(data: bytes | memoryview, expected: str, what: str) -> None:
    """Raises CheckpointDamaged (without a place) unless `data` hashes to `expected`."""
    actual = digest(data)
    if actual != expected:
        raise CheckpointDamaged(f"{what} hashes to {actual} instead of {expected}")


def fetch_whole(store: Store, key: str, size: int, expected: str, what: str) -> bytes:
    """The whole object, of exactly this size and hash. Raises CheckpointDamaged, StoreError."""
    with damage(store, key):
        data = store.get(key, max_bytes=size)
        if len(data) != size:
            raise CheckpointDamaged(f"{what} has {len(data)} bytes instead of {size}")
        check(data, expected, what)
    return data
