"""Reading and appending as steps: generators that yield one store operation at a time and hold no store.

`run_log` drives them with a real store; the model check drives the same code with a scheduler between any two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from resilient.errors import LogDamaged, TimedOut
from resilient.log.entries import MAX_ENTRY_BYTES, Base, Entry, decode, encode
from resilient.log.envelope import digest, seal, unseal
from resilient.log.summary import MAX_SUMMARY_BYTES, decode_summary
from resilient.log.validity import fold, fold_all
from resilient.log.view import EMPTY, LogView
from storage.errors import KeyExists, OutcomeUnknown, StoreError, StoreFailed, StoreUnavailable

HINT_KEY = "log/hint"
MAX_WINDOW = 64  # slots read at once
MAX_BASES_TRIED = 4
LOOK_AHEAD = 8  # slots


@dataclass(frozen=True, kw_only=True, slots=True)
class Get:
    """Read these objects, in any order. Answer: their bytes by position, None for a missing one.

    An object of more than `max_bytes` is answered by its absence of sense: empty bytes, which nothing decodes.
    """

    keys: tuple[str, ...]
    max_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PutIfAbsent:
    """store.put_if_absent; its errors are thrown into the generator."""

    key: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Put:
    """store.put; its errors are thrown into the generator."""

    key: str
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Let some time pass before trying again; throw TimedOut into the generator when patience is at its end."""

    attempt: int  # from 0


Op = Get | PutIfAbsent | Put | Wait
Answer = tuple[bytes | None, ...] | None
T = TypeVar("T")
Steps = Generator[Op, Answer, T]
"""A computation that yields operations, is sent their answers and returns a T."""


def slot_key(slot: int) -> str:
    """Key of the object that is this slot."""
    return f"log/{slot:020d}"


def _get(keys: Sequence[str], max_bytes: int) -> Steps[tuple[bytes | None, ...]]:
    answer = yield Get(keys=tuple(keys), max_bytes=max_bytes)
    if answer is None:
        raise TypeError("a Get is answered by bytes")
    return answer


def understood(data: bytes, slot: int) -> Entry | None:
    """The entry in a slot's bytes, None if they are damaged. Raises FormatUnsupported."""
    try:
        return decode(data, slot_key(slot))
    except LogDamaged:
        return None


# ---- reading
def hint_bytes(base: int | None, seen: int) -> bytes:
    """The hint object: where a reader may start, and how many slots its writer has seen filled."""
    return seal({"v": 1, "kind": "hint", "base": base, "seen": seen})


def _hint() -> Steps[tuple[int | None, int]]:
    """The hinted base, and how many slots must exist: a lost tail would else pass for the end of the log."""
    (data,) = yield from _get([HINT_KEY], MAX_ENTRY_BYTES)
    if data is None:
        return None, 0
    try:
        body = unseal(data, HINT_KEY)
    except LogDamaged:
        return None, 0
    base, seen = body.get("base"), body.get("seen")
    return (
        base if type(base) is int and base >= 0 else None,
        seen if type(seen) is int and seen >= 0 else 0,
    )


def _summed_up(base: Base) -> Steps[LogView | None]:
    """The view that a base's summary holds; None if it is gone or not what the entry says."""
    if base.summary.size > MAX_SUMMARY_BYTES:
        return None
    (data,) = yield from _get([base.summary.key], base.summary.size)
    if data is None or len(data) != base.summary.size or digest(data) != base.summary.hash:
        return None
    try:
        view = decode_summary(data, base.summary.key)
    except LogDamaged:
        return None
    return view if view.next_slot == base.upto else None


def _start() -> Steps[tuple[LogView, int]]:
    """Where to start reading, and how many slots are known to exist; slot 0 if no base can be used."""
    slot, seen = yield from _hint()
    for _ in range(MAX_BASES_TRIED):
        if slot is None:
            break
        (data,) = yield from _get([slot_key(slot)], MAX_ENTRY_BYTES)
        entry = None if data is None else understood(data, slot)
        if not isinstance(entry, Base) or entry.upto > slot:
            break
        view = yield from _summed_up(entry)
        if view is not None:
            return view, seen
        slot = entry.previous if entry.previous is not None and entry.previous < slot else None
    return EMPTY, seen


def catch_up(view: LogView, seen: int = 0) -> Steps[LogView]:
    """The view at the end of the log, read on from `view`. Raises LogDamaged if a slot below `seen` is missing."""
    window = 1
    while True:
        slots = range(view.next_slot, view.next_slot + window)
        found = yield from _get([slot_key(slot) for slot in slots], MAX_ENTRY_BYTES)
        entries = []
        for slot, data in zip(slots, found, strict=True):
            if data is None:
                break  # the end of the dense prefix, whatever was seen behind it
            entries.append(understood(data, slot))
        view = fold_all(view, entries)
        if len(entries) < window:
            if view.next_slot < seen:
                what = f"slot {view.next_slot} is gone: the log has had {seen} slots"
                raise LogDamaged(what, where=slot_key(view.next_slot), next="restore it from a copy of the store")
            return view
        window = min(window * 2, MAX_WINDOW)


def read_all() -> Steps[LogView]:
    """The view of the whole log, from the hinted base on, or from slot 0.

    Slots are filled in order and never emptied, so one that is missing before another that exists was lost: that is
    LogDamaged, never the end. Looks some slots ahead for such a one.
    """
    view, seen = yield from _start()
    while True:
        view = yield from catch_up(view, seen)
        ahead = range(view.next_slot + 1, view.next_slot + 1 + LOOK_AHEAD)
        found = yield from _get([slot_key(slot) for slot in ahead], MAX_ENTRY_BYTES)
        filled = [slot for slot, data in zip(ahead, found, strict=True) if data is not None]
        if not filled:
            return view
        seen = filled[-1] + 1  # appended while we read, or the slot before it is gone: reading on tells


# ---- appending
@dataclass(frozen=True, kw_only=True)
class Filled:
    """What became of one slot."""

    entry: Entry | None  # None: damaged
    ours: bool
    tried: bool  # a put of ours to this slot may have been carried out


class _Try:
    """One slot, tried until it is seen filled."""

    def __init__(self, slot: int, data: bytes) -> None:
        self.slot, self.data = slot, data
        self.tried = False  # a put may have been carried out, now or later

    def once(self) -> Steps[Filled | None]:
        """Put, and look where the put does not say; None where the slot is not seen filled."""
        try:
            yield PutIfAbsent(key=slot_key(self.slot), data=self.data)
        except KeyExists:
            pass  # whose it is, the bytes say: an earlier try of ours may have won
        except OutcomeUnknown:
            self.tried = True
        except StoreUnavailable:
            pass  # not done
        except StoreFailed:
            self.tried = True  # a disk may fail after the name is there, and before it is durable
            raise
        else:
            return Filled(entry=understood(self.data, self.slot), ours=True, tried=True)
        try:
            (found,) = yield from _get([slot_key(self.slot)], MAX_ENTRY_BYTES)
        except StoreUnavailable:
            return None
        if found is None:
            return None
        return Filled(entry=understood(found, self.slot), ours=found == self.data, tried=self.tried)


def fill(slot: int, data: bytes) -> Steps[Filled]:
    """Put `data` into the slot and repeat the very same put until the slot is seen filled, by us or by another.

    Raises OutcomeUnknown when it must end before with a put that may still arrive; else the StoreError that ended it.
    """
    trying, attempt = _Try(slot, data), 0
    while True:
        try:
            filled = yield from trying.once()
            if filled is not None:
                return filled
            yield Wait(attempt=attempt)
        except (StoreError, TimedOut) as error:
            if trying.tried:
                raise OutcomeUnknown(
                    f"the store does not say whether the entry was written: {error}",
                    where=slot_key(slot),
                    next="repeat the call; until it is known, delete nothing that the entry refers to",
                ) from error
            if isinstance(error, TimedOut):
                raise StoreUnavailable(f"the entry was not written: {error}", where=slot_key(slot)) from error
            raise
        attempt += 1


class Position:
    """Where a writer stands: the prefix it has read."""

    def __init__(self, view: LogView) -> None:
        self.view = view

    def append(self, make: Callable[[LogView], Entry | int]) -> Steps[int]:
        """Append what `make` returns for the prefix read so far; whoever loses a slot reads it and makes anew.

        `make` raises what forbids the entry, or returns the slot where it finds its work done already.
        Returns the entry's slot. Raises as `make` and `fill` do; OutcomeUnknown when the slot is found damaged after
        a put that may have been carried out.
        """
        while True:
            slot = self.view.next_slot
            entry = make(self.view)
            if isinstance(entry, int):
                return entry
            filled = yield from fill(slot, encode(entry))
            self.view = fold(self.view, slot, filled.entry)
            if filled.ours:
                return slot
            if filled.entry is None and filled.tried:
                raise OutcomeUnknown("the slot was found damaged after a put of ours", where=slot_key(slot))
