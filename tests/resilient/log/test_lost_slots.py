"""A slot that was filled and is gone is never taken for the end of the log."""

from __future__ import annotations

import pytest

from resilient.errors import LogDamaged
from resilient.log.entries import Ref
from resilient.log.run_log import RunLog
from storage.memory import MemoryStore


def run_of(commits: int) -> MemoryStore:
    """Slot 0 the epoch, slot 1 the generation, then the commits."""
    store = MemoryStore()
    leader = RunLog(store).lead("here")
    generation = leader.open_generation(members=1, layout={"ranks": 1})
    for step in range(1, commits + 1):
        manifest = Ref(key=f"data/{step}/manifest", hash=f"{step:032x}", size=10)
        leader.commit(generation=generation, step=step, tier="disk", manifest=manifest)
    return store


@pytest.mark.parametrize("hint", [True, False], ids=["with the hint", "without"])
@pytest.mark.parametrize("slot", [0, 1, 2, 3])
def test_a_slot_that_is_gone_from_the_middle_is_damage(slot: int, *, hint: bool) -> None:
    store = run_of(3)
    store.delete(f"log/{slot:020d}")
    if not hint:
        store.delete("log/hint")
    with pytest.raises(LogDamaged, match=f"slot {slot} is gone"):
        RunLog(store).read()


def test_a_slot_that_is_gone_from_the_end_is_damage_because_the_hint_knows_it() -> None:
    store = run_of(3)
    store.delete(f"log/{4:020d}")
    with pytest.raises(LogDamaged, match="slot 4 is gone"):
        RunLog(store).read()


def test_a_stale_or_damaged_hint_changes_nothing() -> None:
    store = run_of(3)
    for hint in (b"", b"noise", store.get("log/hint")[:-3]):
        store.put("log/hint", hint)
        assert [commit.step for commit in RunLog(store).read().commits] == [1, 2, 3]
