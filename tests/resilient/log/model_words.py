"""The vocabulary of the model check: operations, faults, choices, acknowledgements, violations."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from resilient.errors import LogDamaged
from resilient.log.entries import Ref, State, decode

Steps = Generator[Any, Any, Any]


class Violation(AssertionError):
    """An invariant does not hold; the first word names it."""


@dataclass(frozen=True)
class Delete:
    """store.delete."""

    key: str


@dataclass(frozen=True)
class List:
    """store.list."""

    prefix: str


@dataclass(frozen=True)
class Tick:
    """Time passes."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Chances per operation; drawn per seed."""

    reply_lost: float = 0.0  # carried out, and the caller is told that it is unknown
    delayed: float = 0.0  # carried out later or never, the caller is told that it is unknown
    repeated: float = 0.0  # carried out now and once more later
    refused: float = 0.0  # not carried out, and the caller is told so
    give_up: float = 0.2  # a Wait ends the caller's patience
    crash: float = 0.0
    pause: float = 0.0
    damage: float = 0.0
    hint_damage: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the ranks of one generation go on from, and since when that is decided."""

    at: int | None  # next_slot of the view that it rests on; None: whatever is the newest
    state: State | None
    from_memory: bool
    goes_back: bool = False  # the user wants to leave newer commits behind


@dataclass(frozen=True, kw_only=True)
class Ack:
    """A commit that its caller was told about."""

    slot: int
    step: int
    at: int


@lru_cache(maxsize=4096)
def understood(data: bytes, _: int = 0) -> Any:
    """The entry, None if damaged. Remembered: the model decodes the same bytes over and over."""
    try:
        return decode(data)
    except LogDamaged:
        return None


def parts_of(manifest: Ref) -> Iterable[str]:
    """Keys of all that belongs to a manifest."""
    prefix = manifest.key.removesuffix("/manifest")
    return (f"{prefix}/n00000.00000", manifest.key)
