"""One writer leads, on one line: others are fenced, overtaken or off the line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from resilient.errors import EntryInvalid, Fenced, OffLine, Overtaken
from resilient.log import Leader, RunLog, State
from resilient.log.entries import Drop, decode
from resilient.log.protocol import slot_key
from storage.errors import StoreUnavailable
from tests.resilient.log.runs import commit, leading
from tests.resilient.log.stores import Watched, log_in, ref


def test_a_former_writer_is_fenced(store: Watched) -> None:
    first, generation = leading(store)
    commit(first, generation, 1)
    second, later = leading(store)
    for act in (
        lambda: commit(first, generation, 2),
        lambda: first.drop([ref("a")]),
        lambda: first.open_generation(members=1, layout={}),
        first.refresh,
    ):
        with pytest.raises(Fenced, match=f"epoch {second.epoch} leads"):
            act()
    commit(second, later, 2)
    assert [found.step for found in RunLog(store).read().commits] == [1, 2]


def test_who_loses_a_slot_to_an_entry_of_an_older_epoch_takes_the_next(store: Watched) -> None:
    first, generation = leading(store)
    second = log_in(store).lead("second")
    late = replace_epoch(store, first, generation)
    store.inner.put_if_absent(slot_key(second.view.next_slot), late)
    number = second.open_generation(members=2, layout={})
    assert number == second.epoch + 2
    assert RunLog(store).read().invalid == 1
    assert RunLog(store).read().newest is None


def replace_epoch(store: Watched, first: Leader, generation: int) -> bytes:
    other = Watched()
    for slot in range(first.view.next_slot):
        other.inner.put(slot_key(slot), store.inner.get(slot_key(slot)))
    slot = log_commit_elsewhere(first, other, generation)
    return other.inner.get(slot_key(slot))


def log_commit_elsewhere(first: Leader, other: Watched, generation: int) -> int:
    first._log.store, kept = other, first._log.store
    try:
        return commit(first, generation, 5)
    finally:
        first._log.store = kept


def test_one_leader_may_be_used_by_many_threads(store: Watched) -> None:
    leader, generation = leading(store, base_every=10)
    with ThreadPoolExecutor(8) as pool:
        slots = list(pool.map(lambda step: commit(leader, generation, step), range(100)))
    assert len(set(slots)) == 100
    view = RunLog(store).read()
    assert [found.step for found in view.commits] == list(range(100))
    assert view == leader.view


def test_who_does_not_restore_goes_on_from_the_newest(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 500)
    later, number = leading(store)
    opened = later.view.opened(number)
    assert opened is not None
    assert opened.restored == State(generation=generation, step=500)
    assert later.view.find(500) is not None


def test_going_on_from_an_earlier_step_leaves_the_later_ones_behind(store: Watched) -> None:
    leader, generation = leading(store)
    for step in (100, 200, 300):
        commit(leader, generation, step)
    back = leader.open_generation(members=1, layout={}, restored=State(generation=generation, step=200))
    view = RunLog(store).read()
    assert [found.step for found in view.commits] == [100, 200]
    assert [found.step for found in view.off_line] == [300]
    with pytest.raises(OffLine, match="went on from step 200"):
        commit(leader, generation, 250)  # a late save of the abandoned generation
    with pytest.raises(OffLine):
        leader.open_generation(members=1, layout={}, restored=State(generation=generation, step=300))
    commit(leader, back, 250)
    assert commit(leader, generation, 150)  # before the fork: still the run's own past
    assert [found.step for found in RunLog(store).read().commits] == [100, 150, 200, 250]


def test_a_job_that_wakes_up_late_does_not_lead(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1)
    asleep = log_in(store)
    view = asleep.read()
    other, later = leading(store)
    commit(other, later, 2)
    with pytest.raises(Overtaken, match="step 2 was committed by others"):
        asleep.lead("late", restored_at=view.next_slot)
    commit(other, later, 3)  # nobody was fenced
    asleep.lead("again", restored_at=asleep.read().next_slot)


def test_a_commit_of_a_generation_that_was_never_opened_is_refused(store: Watched) -> None:
    leader, generation = leading(store)
    for number in (generation + 1, 0):
        with pytest.raises(EntryInvalid, match="has not been opened"):
            commit(leader, number, 1)
    with pytest.raises(OffLine):
        leader.open_generation(members=1, layout={}, restored=State(generation=77, step=1))


def test_a_step_committed_twice_shows_the_newer_one(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 5, "old")
    commit(leader, generation, 5, "new")
    found = leader.view.find(5)
    assert found is not None
    assert found.manifest == ref("new")
    assert [hidden.manifest for hidden in leader.view.replaced] == [ref("old")]
    leader.drop([ref("old")])
    assert leader.view.find(5) == found
    assert leader.view.may_delete(ref("old"))
    assert not leader.view.may_delete(ref("new"))


def test_a_dropped_commit_is_gone_and_its_data_may_go_unless_used(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1, "a")
    leader.commit(generation=generation, step=2, tier="disk", manifest=ref("b"), uses=[ref("a")])
    slot = leader.drop([ref("a")])
    view = RunLog(store).read()
    assert [found.step for found in view.commits] == [2]
    assert view.dropped == {ref("a").key: slot}
    assert not view.may_delete(ref("a"))
    with pytest.raises(EntryInvalid, match="may be dropped"):
        leader.commit(generation=generation, step=3, tier="disk", manifest=ref("c"), uses=[ref("a")])
    with pytest.raises(EntryInvalid, match="was dropped"):
        commit(leader, generation, 1, "a")
    leader.drop([ref("b")])
    assert leader.view.may_delete(ref("a"))


def test_dropping_again_writes_nothing(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1, "a")
    leader.drop([ref("a")])
    end = leader.view.next_slot
    leader.drop([ref("a")])
    assert leader.view.next_slot == end


def test_a_drop_with_another_hash_is_refused(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1, "a")
    with pytest.raises(EntryInvalid, match="another hash"):
        leader.drop([replace(ref("a"), hash="1" * 32)])


def test_a_long_drop_takes_several_entries(store: Watched) -> None:
    leader, generation = leading(store)
    names = [f"{'x' * 150}-{step}" for step in range(100)]
    for step, name in enumerate(names):
        commit(leader, generation, step, name)
    before = leader.view.next_slot
    leader.drop([ref(name) for name in names[:-1]])
    entries = [decode(store.inner.get(slot_key(slot))) for slot in range(before, leader.view.next_slot)]
    assert len(entries) > 3
    assert all(isinstance(entry, Drop) for entry in entries)
    assert [found.step for found in RunLog(store).read().commits] == [99]


def test_a_failing_base_does_not_fail_the_commit(store: Watched) -> None:
    said: list[str] = []
    leader = RunLog(store, base_every=3, report=said.append).lead("test")
    generation = leader.open_generation(members=1, layout={})

    def before(key: str) -> None:
        if key.startswith("log/base-"):
            raise StoreUnavailable("no")

    store.before = before
    for step in range(3):
        commit(leader, generation, step)
    assert len(leader.view.commits) == 3
    assert any("no base" in text for text in said)
    store.before = lambda _: None
    commit(leader, generation, 3)
    assert RunLog(store).read().last_base is not None
