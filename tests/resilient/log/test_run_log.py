"""Reading and leading a log in a store."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from resilient.errors import (
    EntryInvalid,
    EpochUncertain,
    Fenced,
    FormatUnsupported,
    LogDamaged,
    OffLine,
    Overtaken,
    SaveUnknown,
)
from resilient.log import EMPTY, Leader, RunLog, SingleWriterWarning, State
from resilient.log.entries import Drop, decode
from resilient.log.envelope import seal
from resilient.log.protocol import HINT_KEY, slot_key
from storage.errors import OutcomeUnknown, StoreDenied, StoreFailed, StoreUnavailable, StoreUnsupported
from storage.local import LocalStore
from storage.store import Store
from tests.resilient.log.stores import Watched, log_in, ref


@pytest.fixture
def store() -> Watched:
    return Watched()


def leading(store: Store, **options: int) -> tuple[Leader, int]:
    leader = log_in(store, **options).lead("test")
    return leader, leader.open_generation(members=2, layout={"shard": 2})


def commit(leader: Leader, generation: int, step: int, name: str = "") -> int:
    return leader.commit(generation=generation, step=step, tier="disk", manifest=ref(name or f"{generation}-{step}"))


def damage(store: Watched, key: str) -> None:
    data = bytearray(store.inner.get(key))
    data[60] ^= 4
    store.inner.put(key, bytes(data))


# ---- reading
def test_a_store_without_a_log_is_an_empty_run(store: Watched) -> None:
    assert RunLog(store).read() == EMPTY
    assert RunLog(store).read().newest is None


def test_a_commit_is_seen_by_every_later_reader(store: Watched) -> None:
    leader, generation = leading(store)
    slot = leader.commit(
        generation=generation, step=7, tier="object", manifest=ref("a"), metrics={"loss": 1}, nonce="ab" * 8
    )
    found = RunLog(store).read().newest
    assert found is not None
    assert (found.slot, found.step, found.generation) == (slot, 7, generation)
    assert found.manifest == ref("a")
    assert found.metrics == {"loss": 1.0}
    assert found.entry.tier == "object"


def test_reading_writes_nothing(store: Watched) -> None:
    leader, generation = leading(store, base_every=4)
    for step in range(9):
        commit(leader, generation, step)
    store.calls.clear()
    RunLog(store).read()
    assert {call for call, _ in store.calls} == {"get"}


def test_reading_on_fetches_only_what_is_new(store: Watched) -> None:
    leader, generation = leading(store)
    for step in range(20):
        commit(leader, generation, step)
    log = RunLog(store)
    view = log.read()
    commit(leader, generation, 20)
    store.calls.clear()
    assert log.read(view) == RunLog(store).read()
    assert store.calls[0] == ("get", slot_key(view.next_slot))
    assert ("get", slot_key(view.next_slot - 1)) not in store.calls[:2]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_logs_of_every_length_are_read_to_their_end(store: Watched, length: int) -> None:
    leader, generation = leading(store)
    for step in range(length):
        commit(leader, generation, step)
    view = RunLog(store).read()
    assert view == leader.view
    assert [found.step for found in view.commits] == list(range(length))


def test_a_long_log_is_read_from_its_newest_base(store: Watched) -> None:
    leader, generation = leading(store, base_every=50)
    for step in range(500):
        commit(leader, generation, step)
    store.calls.clear()
    assert RunLog(store).read() == leader.view
    assert len(store.calls) < 150
    assert ("get", slot_key(0)) not in store.calls


def spoil(store: Watched, key: str, how: str) -> None:
    if how == "gone":
        store.inner.delete(key)
    elif how == "empty":
        store.inner.put(key, b"")
    elif how == "too large":
        store.inner.put(key, b"x" * 9_000_000)
    elif how == "damaged":
        damage(store, key)
    else:
        store.inner.put(key, seal({"v": 1, "kind": "hint", "base": int(how)}))


@pytest.mark.parametrize("how", ["gone", "empty", "too large", "damaged", "0", "3", "10", "-1"])
def test_the_hint_may_be_anything(store: Watched, how: str) -> None:
    leader, generation = leading(store, base_every=10)
    for step in range(60):
        commit(leader, generation, step)
    spoil(store, HINT_KEY, how)
    assert RunLog(store).read() == leader.view


@pytest.mark.parametrize("how", ["gone", "empty", "too large", "damaged", "0"])
def test_a_base_without_its_summary_means_an_earlier_one(store: Watched, how: str) -> None:
    leader, generation = leading(store, base_every=20)
    for step in range(100):
        commit(leader, generation, step)
    summaries = [info.key for info in store.inner.list("log/base-")]
    assert len(summaries) >= 4
    spoil(store, summaries[-1], how)
    store.calls.clear()
    assert RunLog(store).read() == leader.view
    assert ("get", summaries[-2]) in store.calls
    assert ("get", slot_key(0)) not in store.calls
    for key in summaries:
        spoil(store, key, how)
    assert RunLog(store).read() == leader.view


def test_a_reader_that_cannot_reach_the_store_does_not_see_an_empty_run(store: Watched) -> None:
    leading(store)

    def denied(key: str, **_: object) -> bytes:
        raise StoreDenied("no")

    store.get = denied  # type: ignore[method-assign]
    with pytest.raises(StoreDenied):
        RunLog(store).read()


@pytest.mark.parametrize("gone", ["the base", "all", "one in the middle", "the last before the base"])
def test_a_log_that_was_cut_is_not_taken_for_a_shorter_one(store: Watched, gone: str) -> None:
    leader, generation = leading(store, base_every=10)
    for step in range(25):
        commit(leader, generation, step)
    base = leader.view.last_base
    assert base is not None
    for info in list(store.inner.list("log/base-")):
        store.inner.delete(info.key)
    for slot in {"the base": [base], "all": range(30), "one in the middle": [5]}.get(gone, [base - 1]):
        store.inner.delete(slot_key(slot))
    with pytest.raises(LogDamaged, match="is gone"):
        RunLog(store).read()
    with pytest.raises(LogDamaged, match="is gone"):
        RunLog(store).lead("test")


def test_a_log_by_a_newer_version_is_refused_not_skipped(store: Watched) -> None:
    leader, generation = leading(store)
    commit(leader, generation, 1)
    store.inner.put(slot_key(3), seal({"v": 2, "kind": "commit", "news": True}))
    with pytest.raises(FormatUnsupported):
        RunLog(store).read()


# ---- leading
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


# ---- outcomes
def test_a_put_of_unknown_outcome_is_repeated_until_its_slot_is_filled(store: Watched) -> None:
    leader, generation = leading(store)
    lost = iter([True, True, True, False, False, False])

    def before(key: str) -> None:
        if next(lost):
            raise OutcomeUnknown("lost on the way")

    store.before = before
    slot = commit(leader, generation, 1)
    puts = [key for call, key in store.calls if call == "put_if_absent"]
    assert puts[-4:] == [slot_key(slot)] * 4
    assert len(RunLog(store).read().commits) == 1


def test_a_commit_whose_reply_was_lost_is_written_once(store: Watched) -> None:
    leader, generation = leading(store)

    def after(key: str) -> None:
        store.after = lambda _: None
        raise OutcomeUnknown("reply lost")

    store.after = after
    slot = commit(leader, generation, 1)
    view = RunLog(store).read()
    assert [found.slot for found in view.live] == [slot]
    assert view.next_slot == slot + 1


def test_an_unknown_save_is_settled_by_calling_again(store: Watched) -> None:
    leader, generation = leading(store, patience_s=1)

    def get(key: str, *, max_bytes: int | None = None) -> bytes:
        raise StoreUnavailable("down")

    def after(key: str) -> None:
        raise OutcomeUnknown("reply lost")

    store.after, working = after, store.get
    store.get = get  # type: ignore[method-assign]
    arguments = {"generation": generation, "step": 1, "tier": "disk", "manifest": ref("a"), "nonce": "cd" * 8}
    with pytest.raises(SaveUnknown, match="step 1"):
        leader.commit(**arguments)  # type: ignore[arg-type]
    store.get, store.after = working, lambda _: None  # type: ignore[method-assign]
    slot = leader.commit(**arguments)  # type: ignore[arg-type]
    assert [found.slot for found in RunLog(store).read().live] == [slot]
    assert leader.commit(**arguments) == slot  # type: ignore[arg-type]


def test_an_unknown_save_that_was_left_behind_is_off_the_line(store: Watched) -> None:
    leader, generation = leading(store, patience_s=0)
    commit(leader, generation, 1)

    def after(key: str) -> None:
        store.after = lambda _: None
        store.get = down  # type: ignore[method-assign]
        raise OutcomeUnknown("reply lost")

    def down(key: str, *, max_bytes: int | None = None) -> bytes:
        store.get = working  # type: ignore[method-assign]
        raise StoreUnavailable("down")

    working, store.after = store.get, after
    arguments = {"generation": generation, "step": 2, "tier": "disk", "manifest": ref("a"), "nonce": "cd" * 8}
    with pytest.raises(SaveUnknown):
        leader.commit(**arguments)  # type: ignore[arg-type]
    leader.open_generation(members=1, layout={}, restored=State(generation=generation, step=1))
    with pytest.raises(OffLine, match="left behind since"):
        leader.commit(**arguments)  # type: ignore[arg-type]
    assert not leader.view.may_delete(ref("a"))
    leader.drop([ref("a")])
    assert leader.view.may_delete(ref("a"))


def test_a_put_that_was_surely_not_carried_out_is_no_unknown(store: Watched) -> None:
    leader, generation = leading(store, patience_s=1)

    def before(key: str) -> None:
        raise StoreUnavailable("throttled")

    store.before = before
    with pytest.raises(StoreUnavailable) as caught:
        commit(leader, generation, 1)
    assert not isinstance(caught.value, OutcomeUnknown)


def test_a_disk_that_failed_in_the_middle_leaves_the_outcome_unknown(store: Watched) -> None:
    leader, generation = leading(store)

    def after(key: str) -> None:
        raise StoreFailed("EIO while syncing the directory")

    store.after = after
    with pytest.raises(SaveUnknown):
        commit(leader, generation, 1)


# ---- damage
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


# ---- stores
class Weak(Watched):
    conditional = False


def test_a_store_without_put_if_absent_is_refused() -> None:
    store = Weak()
    with pytest.raises(StoreUnsupported, match="no atomic put-if-absent"):
        RunLog(store).lead("test")
    assert store.calls == []
    assert RunLog(store).read() == EMPTY


def test_a_single_writer_may_use_it_and_is_told_what_is_weaker() -> None:
    with pytest.warns(SingleWriterWarning, match="not fenced"):
        leader = RunLog(Weak(), single_writer=True).lead("test")
    generation = leader.open_generation(members=1, layout={})
    commit(leader, generation, 1)


def test_a_log_on_disk_is_found_by_another_process(tmp_path: Path) -> None:
    leader, generation = leading(LocalStore(tmp_path))
    commit(leader, generation, 3)
    code = "import sys; from resilient.log import RunLog; from storage.local import LocalStore; print("
    code += "RunLog(LocalStore(sys.argv[1])).read().newest.step, 'torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["3", "False", "False"]
