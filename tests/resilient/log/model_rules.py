"""The rules of the log, each with the way to leave it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from resilient.errors import LogDamaged, TimedOut
from resilient.log import protocol, validity, view, writer
from resilient.log.entries import MAX_ENTRY_BYTES, Generation, decode, encode
from resilient.log.protocol import Filled, PutIfAbsent, Wait, slot_key
from resilient.log.summary import decode_summary
from resilient.log.validity import fold
from storage.errors import KeyExists, OutcomeUnknown, StoreUnavailable
from tests.resilient.log.model_words import understood

Patch = tuple[Any, str, Any]


def _none(*_: Any) -> None:
    return None


def _loser_tries_the_next(self: Any, make: Callable[..., Any]) -> Any:
    while True:
        slot = self.view.next_slot
        entry = make(self.view)
        if isinstance(entry, int):
            return entry
        filled = yield from protocol.fill(slot, encode(entry))
        if filled.ours:
            self.view = fold(self.view, slot, filled.entry)
            return slot
        self.view = replace(self.view, next_slot=slot + 1)  # whatever is in there


def _fill_once(slot: int, data: bytes) -> Any:
    """Unknown: try the next slot at once, as if this one had gone to another."""
    while True:
        try:
            yield PutIfAbsent(key=slot_key(slot), data=data)
        except KeyExists:
            (found,) = yield protocol.Get(keys=(slot_key(slot),), max_bytes=MAX_ENTRY_BYTES)
            return Filled(entry=protocol.understood(found, slot), ours=found == data, tried=True)
        except OutcomeUnknown:
            return Filled(entry=None, ours=False, tried=False)
        except StoreUnavailable:
            continue
        return Filled(entry=protocol.understood(data, slot), ours=True, tried=True)


def _skip_unknown(self: Any, make: Callable[..., Any]) -> Any:
    while True:
        slot = self.view.next_slot
        entry = make(self.view)
        if isinstance(entry, int):
            return entry
        filled = yield from _fill_once(slot, encode(entry))
        if filled.entry is None and not filled.tried:
            self.view = replace(self.view, next_slot=slot + 1)
            continue
        self.view = fold(self.view, slot, filled.entry)
        if filled.ours:
            return slot


def _fill_with_new_bytes(slot: int, data: bytes) -> Any:
    """Each repetition has a nonce of its own."""
    attempt, tried = 0, False
    while True:
        entry = decode(data)
        data = encode(replace(entry, nonce=f"{attempt + 1:08x}{entry.nonce[8:]}"))
        try:
            yield PutIfAbsent(key=slot_key(slot), data=data)
            return Filled(entry=decode(data), ours=True, tried=True)
        except KeyExists:
            (found,) = yield protocol.Get(keys=(slot_key(slot),), max_bytes=MAX_ENTRY_BYTES)
            return Filled(entry=protocol.understood(found, slot), ours=found == data, tried=tried)
        except OutcomeUnknown:
            tried = True
        except StoreUnavailable:
            pass
        attempt += 1
        try:
            yield Wait(attempt=attempt)
        except TimedOut as error:
            raise (OutcomeUnknown if tried else StoreUnavailable)("model") from error


_open_generation = writer.Writer.open_generation


def _open_as_told(self: Any, **arguments: Any) -> Any:
    """None stays None, instead of the newest commit."""
    if arguments["restored"] is not None:
        return (yield from _open_generation(self, **arguments))
    nonce = self._nonce()
    make = lambda _: Generation(epoch=self.epoch, nonce=nonce, **arguments)  # noqa: E731
    return (yield from self.append(self.checked(make)))


_claim = writer.Writer.claim


def _claim_regardless(self: Any, address: str, _: int | None = None) -> Any:
    return _claim(self, address)


def _check_epoch_only(self: Any, seen: Any) -> None:
    if seen.epoch != self.epoch:
        raise writer.refusal(validity.Objection(rule="epoch", what="model"))


_judge = validity.judge


def _judge_any_snapshot(facts: Any, slot: int, entry: Any) -> Any:
    objection = _judge(facts, slot, entry)
    return None if isinstance(entry, Generation) and objection and objection.rule == "line" else objection


def _older_epoch_without_inference(facts: Any, epoch: int) -> Any:
    return None if epoch == facts.epoch else validity.Objection(rule="epoch", what="model")


def _is_known_without_inference(generations: Any, _: Any, generation: int) -> bool:
    return any(opened.slot == generation for opened in generations)


def _usable_whatever_is_damaged(self: Any, manifest: Any) -> bool:
    return any(commit.manifest == manifest for commit in (*self.live, *self.off_line))


def _catch_up(hole: bool) -> Callable[..., Any]:
    """Reading that takes a damaged entry for the end, or that reads on behind a hole."""

    def catch_up(seen: Any, _: int = 0) -> Any:
        while True:
            slots = range(seen.next_slot, seen.next_slot + 4)
            found = yield protocol.Get(keys=tuple(slot_key(slot) for slot in slots), max_bytes=MAX_ENTRY_BYTES)
            for slot, data in zip(slots, found, strict=True):
                entry = None if data is None else protocol.understood(data, slot)
                if entry is None and not (hole and any(found[slot - slots[0] :])):
                    return seen
                seen = fold(seen, slot, entry)

    return catch_up


def _believe_the_hint() -> Any:
    slot, _ = yield from protocol._hint()
    if slot is None:
        return validity.LogView(), 0
    (data,) = yield protocol.Get(keys=(slot_key(slot),), max_bytes=MAX_ENTRY_BYTES)
    entry = None if data is None else protocol.understood(data, slot)
    if isinstance(entry, protocol.Base):
        seen = yield from protocol._summed_up(entry)
        if seen is not None:
            return seen, 0
    return validity.LogView(next_slot=slot), 0


def _believe_the_summary(base: Any) -> Any:
    (data,) = yield protocol.Get(keys=(base.summary.key,), max_bytes=1 << 20)
    try:
        return None if data is None else decode_summary(data)
    except LogDamaged:
        return None


_start = protocol._start


def _start_at_the_base() -> Any:
    seen, slots = yield from _start()
    if slots > seen.next_slot:
        seen = replace(seen, next_slot=slots - 1)
    return seen, slots


RULES: dict[str, list[Patch]] = {
    # the store's one promise, and the slots
    "put if absent": [],
    "no slot is ever deleted": [],
    "the end is the end of the dense prefix": [
        (protocol, "catch_up", _catch_up(hole=True)), (protocol, "LOOK_AHEAD", 0),
    ],
    "an error is not absence": [],
    "reading claims nothing": [],
    # appending
    "an older epoch's entry is invalid": [
        (validity, "_older_epoch", _none), (writer.Writer, "check", _none),
    ],
    "who loses a slot validates again": [(protocol.Position, "append", _loser_tries_the_next)],
    "an unknown slot is seen filled before the next": [(protocol.Position, "append", _skip_unknown)],
    "a put is repeated with the same bytes": [(protocol, "fill", _fill_with_new_bytes)],
    "entries carry a nonce": [],
    "unknown is not done": [],
    "unknown data are not touched": [],
    # the line
    "commits off the line are invalid": [(validity, "_off_line", _none)],
    "snapshots off the line are not restored": [
        (validity, "judge", _judge_any_snapshot), (writer, "judge", _judge_any_snapshot),
        (view.LogView, "snapshot_counts", lambda *_: True),
    ],
    "who does not restore goes on from the newest": [
        (writer.Writer, "open_generation", _open_as_told),
    ],
    "who was overtaken does not lead": [(writer.Writer, "claim", _claim_regardless)],
    "chosen once for all ranks": [],
    # hint and base
    "the hint is not believed": [(protocol, "_start", _believe_the_hint)],
    "a summary is named by its hash": [(protocol, "_summed_up", _believe_the_summary)],
    "a summary ends where it says": [(protocol, "_start", _start_at_the_base)],
    # damage
    "readers skip a damaged entry": [(protocol, "catch_up", _catch_up(hole=False)), (protocol, "LOOK_AHEAD", 0)],
    "damage ends an epoch": [(writer.Writer, "check", _check_epoch_only)],
    "damage ends the count of earlier snapshots": [(view.LogView, "snapshot_counts", view.LogView.on_line)],
    "entries tell of a damaged epoch": [(validity, "_older_epoch", _older_epoch_without_inference)],
    "commits tell of a damaged generation": [
        (view, "is_known", _is_known_without_inference), (validity, "is_known", _is_known_without_inference),
    ],
    # data
    "a commit uses nothing dropped": [
        (validity, "_refers_to_dropped", _none), (view.LogView, "usable", lambda *_: True),
    ],
    "damage ends the use of earlier commits": [(view.LogView, "usable", _usable_whatever_is_damaged)],
    "deleted only after the drop": [],
    "data in use are kept": [(view.LogView, "in_use", lambda *_: False)],
    "data keys carry a nonce": [],
    "replace commits before it drops": [],
    "only the leader collects": [],
}  # fmt: skip
"""Patches of the real code; an empty list is left out by the model's world or actors (`world.without`)."""


FOCUS = {
    "an error is not absence": "network",
    "an unknown slot is seen filled before the next": "network",
    "a put is repeated with the same bytes": "network",
    "unknown is not done": "network",
    "unknown data are not touched": "network",
    "the end is the end of the dense prefix": "calm",
    "a summary is named by its hash": "damage",
    "readers skip a damaged entry": "damage",
    "damage ends an epoch": "damage",
    "damage ends the count of earlier snapshots": "damage",
    "damage ends the use of earlier commits": "damage",
    "entries tell of a damaged epoch": "damage",
    "commits tell of a damaged generation": "damage",
}
"""The faults under which leaving out the rule shows soonest; for the others they are drawn."""


@contextmanager
def left_out(rule: str | None) -> Iterator[None]:
    """Run the body with one rule left out."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(protocol, "understood", understood))
        for target, name, value in RULES[rule] if rule else []:
            stack.enter_context(patch.object(target, name, value))
            if target is protocol and name == "catch_up":
                stack.enter_context(patch.object(writer, name, value))
        yield
