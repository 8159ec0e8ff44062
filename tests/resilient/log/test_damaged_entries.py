"""A damaged entry costs what it held, and no reader or writer guesses what that was."""

from __future__ import annotations

import pytest

from resilient.errors import EpochUncertain, OffLine
from resilient.log import RunLog, State
from resilient.log.protocol import slot_key
from tests.resilient.log.runs import commit, damage, leading
from tests.resilient.log.stores import Watched, log_in, ref


def test_a_damaged_entry_is_reported_once_and_skipped(store: Watched) -> None:
    leader, generation = leading(store)
    slots = [commit(leader, generation, step) for step in (1, 2, 3)]
    damage(store, slot_key(slots[1]))
    said: list[str] = []
    log = RunLog(store, report=said.append)
    for view in (log.read(), log.read()):
        assert [found.step for found in view.commits] == [1, 3]
        assert view.damaged == (slots[1],)
    assert len(said) == 1
    assert f"log entry {slots[1]}" in said[0]


def test_a_writer_that_meets_damage_may_only_claim_a_new_epoch(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1)
    store.inner.put(slot_key(leader.view.next_slot), b"half an entr")
    for act in (lambda: commit(leader, generation, 2), lambda: leader.drop([ref("a")]), leader.refresh):
        with pytest.raises(EpochUncertain, match="is damaged"):
            act()
    again = log_in(store).lead("again", restored_at=leader.view.next_slot)
    assert not again.view.snapshot_counts(State(generation=generation, step=2))
    with pytest.raises(OffLine, match="damaged entry may hide"):
        commit(again, generation, 2)
    with pytest.raises(OffLine):
        again.open_generation(members=1, layout={}, restored=State(generation=generation, step=2))
    number = again.open_generation(members=1, layout={}, restored=State(generation=generation, step=1))
    commit(again, number, 2)
    assert [found.step for found in RunLog(store).read().commits] == [1, 2]


@pytest.mark.parametrize("slot", [0, 1])
def test_commits_outlive_the_damage_of_their_epoch_and_generation(store: Watched, slot: int) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1)
    damage(store, slot_key(slot))
    commit(leader, generation, 2)  # the leader has read it whole
    view = RunLog(store).read()
    assert [found.step for found in view.commits] == [1, 2]
    assert view.epoch == leader.epoch
    assert view.damaged == (slot,)
