"""Who acts in the model check beside the sessions: readers, deleters, collectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilient.log.protocol import catch_up, read_all
from resilient.log.view import LogView
from resilient.log.writer import Writer
from storage.errors import OutcomeUnknown, StoreUnavailable
from tests.resilient.log.model_words import Delete, List, Steps, Tick, parts_of
from tests.resilient.log.model_world import World

TRIES = 5


class GaveUp(Exception):
    """The actor's patience is at its end."""


def persistent(make: Callable[[], Steps], tries: int = TRIES) -> Steps:
    """Call again while the store is away; raises OutcomeUnknown or GaveUp in the end."""
    unknown = None
    for _ in range(tries):
        try:
            return (yield from make())
        except OutcomeUnknown as error:
            unknown = error
        except StoreUnavailable:
            pass
        yield Tick()
    raise unknown or GaveUp


def checked_read(world: World, view: LogView | None = None) -> Steps:
    """Read everything, and have the result checked."""
    began, at_least = world.now, world.truth.next_slot
    view = yield from read_all() if view is None else catch_up(view)
    if world.damaged_at < began:
        world.check_read(view, began, at_least)
    return view


def delete_all(keys: Any) -> Steps:
    """Delete, however often it must be tried."""
    for key in keys:
        yield from persistent(lambda key=key: (yield Delete(key)))


def deleter(keys: list[str]) -> Steps:
    """Deletes at its leisure, also long after its leader has been fenced."""
    try:
        yield from delete_all(keys)
    except (GaveUp, OutcomeUnknown):
        return


def reader(world: World, readings: int) -> Steps:
    """Reads from the hint, or on from an earlier view; never writes."""
    view = None
    for _ in range(readings):
        try:
            fresh = view is None or world.damaged or world.rng.random() < 0.6
            view = yield from checked_read(world, None if fresh else view)
        except StoreUnavailable:
            view = None
        if "reading claims nothing" in world.without and world.rng.random() < 0.2:
            writer = Writer(view or LogView(), nonce=world.nonce, clock_ns=world.clock_ns)
            yield from persistent(lambda writer=writer: writer.claim("reader"))
        yield Tick()


def foreign_collector(world: World) -> Steps:
    """Deletes uncommitted data without leading (only where the rule that forbids it is left out)."""
    for _ in range(3):
        try:
            view = yield from persistent(lambda: checked_read(world))
            keys = yield List("data/")
            held = {key for known in (*view.live, *view.off_line)
                    for ref in (known.manifest, *known.entry.uses) for key in parts_of(ref)}  # fmt: skip
            yield from delete_all(key for key in keys if key not in held)
        except (GaveUp, OutcomeUnknown):
            return
