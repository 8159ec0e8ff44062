"""A write whose outcome is unknown is settled, never done twice and never taken for done."""

from __future__ import annotations

import pytest

from resilient.errors import OffLine, SaveUnknown
from resilient.log import RunLog, State
from resilient.log.protocol import slot_key
from storage.errors import OutcomeUnknown, StoreFailed, StoreUnavailable
from tests.resilient.log.runs import commit, leading
from tests.resilient.log.stores import Watched, ref


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
