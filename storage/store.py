"""The contract of a store: keys, bytes, and what each operation promises.

Terms. A *key* is a relative path of segments `[A-Za-z0-9_-][A-Za-z0-9._-]*` joined by `/`. An *object* is the bytes
under a key; it is whole or not there, never half. No key may be the path above another (`a` and `a/b`): stores that
are file systems refuse it with KeyInvalid. *Durable* means: it survives the death of this process and, where
the medium can promise it (local disk), a loss of power.

The one thing that shared writing rests on is `put_if_absent`. No listing, rename, modification time or
compare-and-swap is trusted for correctness; `list` serves clean-up and people.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.errors import KeyInvalid, RangeMissing

Buffer = bytes | bytearray | memoryview
Data = Buffer | Sequence[Buffer]
"""What a put takes: one buffer, or pieces to be written one after the other without joining them first."""

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
MAX_KEY_CHARS = 512
MAX_SEGMENT_CHARS = 200  # file systems take 255 bytes
_COMPARE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """What `list` says of one object."""

    key: str
    size: int  # bytes


def is_segment(text: str) -> bool:
    """Whether `text` can be one segment of a key."""
    return len(text) <= MAX_SEGMENT_CHARS and _SEGMENT.fullmatch(text) is not None


def is_key(text: str) -> bool:
    """Whether `text` is a valid key."""
    return len(text) <= MAX_KEY_CHARS and all(is_segment(part) for part in text.split("/"))


def check_key(key: str) -> str:
    """`key` itself. Raises KeyInvalid if it could leave the root, be absolute, hidden or empty."""
    if not is_key(key):
        raise KeyInvalid(f"{key[:120]!r} is not a valid key", next="use segments of letters, digits, '.', '_', '-'")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself: empty, or a key with an optional `/` at its end. Raises KeyInvalid otherwise."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def pieces(data: Data) -> list[memoryview]:
    """`data` as flat byte views, empty ones left out."""
    parts = [data] if isinstance(data, (bytes, bytearray, memoryview)) else data
    views = [memoryview(part) for part in parts]
    return [view.cast("B") for view in views if view.nbytes]  # an empty view may have a shape that cannot be cast


def same_bytes(existing: bytes, data: Data) -> bool:
    """Whether `existing` is exactly `data`, compared piece by piece."""
    held, at = memoryview(existing), 0
    for part in pieces(data):
        # Blocks as bytes: they compare by memcmp, two views item by item.
        for begin in range(0, part.nbytes, _COMPARE_BYTES):
            block = bytes(part[begin : begin + _COMPARE_BYTES])
            if bytes(held[at + begin : at + begin + len(block)]) != block:
                return False
        at += part.nbytes
    return at == held.nbytes


class Store(abc.ABC):
    """Bytes under keys. Instances may be used from several threads at once; every call has a deadline."""

    url: str
    """Where it is, without credentials: fit for messages and logs."""
    conditional: bool
    """Whether put_if_absent is atomic between processes and machines."""

    @abc.abstractmethod
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object. Sees every put that was acknowledged before the call (no cache in between).

        Raises KeyMissing; TooLarge when it has more than `max_bytes`.
        """

    @abc.abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`. Raises KeyMissing; RangeMissing when the object ends before."""

    def get_into(self, key: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from `start`: get_range without a second copy where the store can."""
        data = self.get_range(key, start, out.nbytes)
        if len(data) != out.nbytes:
            raise RangeMissing(f"{len(data)} of {out.nbytes} bytes at {start}", where=f"{self.url}/{key}")
        out.cast("B")[:] = data

    @abc.abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object. Raises KeyMissing."""

    @abc.abstractmethod
    def put(self, key: str, data: Data) -> None:
        """Write the object, replacing what was there: readers see the old bytes or the new. Durable on return."""

    @abc.abstractmethod
    def put_if_absent(self, key: str, data: Data) -> None:
        """Write the object unless the key exists. Durable on return, and visible to every later read.

        Of several callers with different bytes exactly one returns, the others get KeyExists; the object never
        changes afterwards by this operation. It is idempotent: where the key already holds exactly `data`, it
        returns (a put whose reply was lost may simply be repeated; who must tell itself from others puts a nonce
        into the bytes). Raises OutcomeUnknown when it cannot tell whether the write took effect.
        """

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in ascending order of key. May miss or repeat concurrent changes."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error if there is none."""

    def sweep_temporary(self, *, older_than_s: float) -> int:  # noqa: ARG002  (most stores have none)
        """Remove what writers that died left behind; returns how many. Never touches an object or a living writer.

        `older_than_s` is the age from which what a writer on another machine left counts as left behind.
        """
        return 0

    def close(self) -> None:  # noqa: B027  (nothing to give back is a valid answer)
        """Give back connections. The store must not be used afterwards."""
