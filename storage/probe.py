"""A trial whether a store keeps the promise of put_if_absent."""

from __future__ import annotations

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor

from storage.errors import KeyExists, StoreError, StoreUnsupported
from storage.store import Store

_CONTENDERS = 4


def probe_put_if_absent(store: Store) -> None:
    """Writes under `probe/<random>`, tries to overwrite it conditionally, and removes it.

    Raises StoreUnsupported if the store does not claim the promise, or if a second put with other bytes succeeds or
    changes anything, or if of several puts at once not exactly one wins. A trial can refute the promise, never prove
    it. Other errors of the store pass through.
    """
    if not store.conditional:
        raise _unsupported(store, "this kind of store has no atomic put-if-absent")
    nonce = secrets.token_hex(8)
    keys = (f"probe/{nonce}-one-after-the-other", f"probe/{nonce}-at-once")
    try:
        _one_after_the_other(store, keys[0])
        _at_once(store, keys[1])
    finally:
        for key in keys:
            with contextlib.suppress(StoreError):  # a leftover of a few bytes must not hide the finding
                store.delete(key)


def _one_after_the_other(store: Store, key: str) -> None:
    store.put_if_absent(key, b"first")
    try:
        store.put_if_absent(key, b"second")
    except KeyExists:
        pass
    else:
        raise _unsupported(store, "a second put-if-absent with other bytes was accepted")
    if store.get(key) != b"first":
        raise _unsupported(store, "a refused put-if-absent changed the object")
    try:
        store.put_if_absent(key, b"first")
    except KeyExists:
        raise _unsupported(store, "a repeated put-if-absent with the same bytes was refused") from None


def _at_once(store: Store, key: str) -> None:
    bodies = [f"contender {number}".encode() for number in range(_CONTENDERS)]

    def attempt(body: bytes) -> bytes | None:
        try:
            store.put_if_absent(key, body)
        except KeyExists:
            return None
        return body

    with ThreadPoolExecutor(_CONTENDERS) as pool:
        winners = [body for body in pool.map(attempt, bodies) if body is not None]
    if len(winners) != 1:
        raise _unsupported(store, f"of {_CONTENDERS} put-if-absent at once {len(winners)} were accepted")
    if store.get(key) != winners[0]:
        raise _unsupported(store, "the object is not the one whose put-if-absent was accepted")


def _unsupported(store: Store, what: str) -> StoreUnsupported:
    return StoreUnsupported(
        what,
        where=store.url,
        next="use a local or shared disk, or an object store with conditional writes (If-None-Match)",
    )
