"""A log is read to its end whatever became of its hint and bases, and refused where entries are gone."""

from __future__ import annotations

import pytest

from resilient.errors import FormatUnsupported, LogDamaged
from resilient.log import EMPTY, RunLog
from resilient.log.envelope import seal
from resilient.log.protocol import HINT_KEY, slot_key
from storage.errors import StoreDenied
from tests.resilient.log.runs import commit, damage, leading
from tests.resilient.log.stores import Watched, ref


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
