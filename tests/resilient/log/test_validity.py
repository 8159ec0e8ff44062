"""Laws of validity: what a prefix says depends on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient.errors import LogDamaged
from resilient.log.entries import Base, Commit, Drop, Entry, Epoch, Generation, Ref, State
from resilient.log.envelope import seal, unseal
from resilient.log.summary import decode_summary, encode_summary
from resilient.log.validity import fold, fold_all, judge
from resilient.log.view import EMPTY, LogView
from tests.resilient.log.stores import ref

NONCE = "0" * 16
slots = st.integers(0, 12)
steps = st.integers(0, 6)
states = st.builds(State, generation=slots, step=steps)
manifests = st.integers(0, 8).map(lambda number: ref(str(number)))
entries: st.SearchStrategy[Entry | None] = st.one_of(
    st.none(),
    st.builds(Epoch, nonce=st.just(NONCE), address=st.sampled_from(["a", "b"]), wall_ns=st.just(0)),
    st.builds(
        Generation,
        epoch=slots,
        nonce=st.just(NONCE),
        members=st.just(1),
        layout=st.just({}),
        restored=st.none() | states,
        source=st.just(""),
    ),
    st.builds(
        Commit,
        epoch=slots,
        nonce=st.just(NONCE),
        generation=slots,
        step=steps,
        restore_step=steps,
        tier=st.just("disk"),
        manifest=manifests,
        uses=st.lists(manifests, max_size=2, unique_by=lambda used: used.key).map(tuple),
        metrics=st.dictionaries(st.sampled_from(["loss"]), st.floats(allow_nan=False)),
    ),
    st.builds(
        Drop,
        epoch=slots,
        nonce=st.just(NONCE),
        manifests=st.lists(manifests, max_size=3, unique_by=lambda used: used.key).map(tuple),
    ),
    st.builds(Base, epoch=slots, nonce=st.just(NONCE), summary=manifests, upto=slots, previous=st.none()),
)
logs = st.lists(entries, max_size=14)


def view_of(log: list[Entry | None]) -> LogView:
    view = EMPTY
    for slot, entry in enumerate(log):
        view = fold(view, slot, entry)
    return view


@given(logs, st.integers(0, 14))
def test_reading_in_pieces_is_reading_at_once(log: list[Entry | None], cut: int) -> None:
    assert fold_all(fold_all(EMPTY, log[:cut]), log[cut:]) == fold_all(EMPTY, log) == view_of(log)


@given(logs)
def test_a_summary_holds_all_that_a_view_says(log: list[Entry | None]) -> None:
    view = view_of(log)
    assert decode_summary(encode_summary(view)) == view
    assert encode_summary(decode_summary(encode_summary(view))) == encode_summary(view)


@given(logs, logs)
def test_reading_on_from_a_summary_is_reading_from_the_start(log: list[Entry | None], more: list[Entry | None]) -> None:
    assert fold_all(decode_summary(encode_summary(view_of(log))), more) == view_of(log + more)


@given(logs)
def test_an_earlier_view_is_never_changed_by_reading_on(log: list[Entry | None]) -> None:
    view = EMPTY
    for slot, entry in enumerate(log):
        before = encode_summary(view)
        after = fold(view, slot, entry)
        assert encode_summary(view) == before
        view = after


@given(logs)
def test_what_is_shown_is_on_the_line_not_dropped_and_ascending(log: list[Entry | None]) -> None:
    view = view_of(log)
    for commit in view.live:
        assert view.on_line(commit.state)
        assert commit.manifest.key not in view.dropped
        assert commit.slot not in view.damaged
        assert not view.may_delete(commit.manifest)
    numbers = [commit.step for commit in view.commits]
    assert numbers == sorted(set(numbers))
    assert view.newest is None or view.newest.step == max(numbers)
    assert {commit.slot for commit in view.commits} | {commit.slot for commit in view.replaced} == {
        commit.slot for commit in view.live
    }


@given(logs, entries)
def test_an_invalid_entry_changes_nothing_but_the_end(log: list[Entry | None], entry: Entry | None) -> None:
    view = view_of(log)
    if entry is None or judge(view, view.next_slot, entry) is None:
        return
    after = fold(view, view.next_slot, entry)
    assert after.invalid == view.invalid + 1
    assert (after.live, after.off_line, after.dropped, after.generations, after.epoch) == (
        view.live, view.off_line, view.dropped, view.generations, view.epoch,
    )  # fmt: skip


@given(logs, entries)
def test_only_entries_of_the_newest_epoch_are_valid(log: list[Entry | None], entry: Entry | None) -> None:
    view = view_of(log)
    if entry is None or isinstance(entry, Epoch) or judge(view, view.next_slot, entry) is not None:
        return
    assert entry.epoch == view.epoch or entry.epoch in view.damaged
    assert view.epoch is None or entry.epoch >= view.epoch


def commit(generation: int, step: int, name: str, *uses: Ref) -> Commit:
    return Commit(
        epoch=0, nonce=NONCE, generation=generation, step=step, restore_step=0, tier="disk", manifest=ref(name),
        uses=uses,
    )  # fmt: skip


def generation(restored: State | None) -> Generation:
    return Generation(epoch=0, nonce=NONCE, members=1, layout={}, restored=restored, source="")


EPOCH = Epoch(nonce=NONCE, address="a", wall_ns=0)


def test_a_state_is_on_the_line_up_to_the_restore_step_of_every_later_generation() -> None:
    view = view_of(
        [
            EPOCH,
            generation(None),
            generation(State(generation=1, step=50)),
            generation(State(generation=2, step=80)),
            generation(State(generation=3, step=70)),
        ]
    )
    for number, last in {1: 50, 2: 70, 3: 70}.items():
        assert view.on_line(State(generation=number, step=last))
        assert not view.on_line(State(generation=number, step=last + 1))
    assert view.on_line(State(generation=4, step=10**9))
    assert not view.on_line(State(generation=5, step=0))


def test_a_commit_left_behind_stays_to_be_dropped_and_holds_its_data() -> None:
    log: list[Entry | None] = [
        EPOCH, generation(None), commit(1, 5, "a"), commit(1, 9, "b"), generation(State(generation=1, step=5)),
    ]  # fmt: skip
    view = view_of(log)
    assert [left.step for left in view.off_line] == [9]
    assert view.in_use(ref("b"))
    dropped = fold(view, 5, Drop(epoch=0, nonce=NONCE, manifests=(ref("b"),)))
    assert dropped.off_line == ()
    assert dropped.may_delete(ref("b"))


def test_only_attempts_of_older_epochs_that_were_never_committed_are_orphans() -> None:
    log: list[Entry | None] = [
        EPOCH, generation(None),
        Commit(
            epoch=0, nonce=NONCE, generation=1, step=5, restore_step=0, tier="disk",
            manifest=Ref(key="data/00000001/000000000005/aa/manifest", hash="0" * 32, size=1),
        ),
        EPOCH,
    ]  # fmt: skip
    view = view_of(log)
    assert view.is_orphan("data/00000001/000000000005/bb", epoch=3)
    assert view.is_orphan("data/00000001/000000000005/a", epoch=3)
    assert not view.is_orphan("data/00000001/000000000005/aa", epoch=3)
    assert not view.is_orphan("data/00000004/000000000005/bb", epoch=3)
    assert not view.is_orphan("data/00000001/000000000005/bb", epoch=0)
    assert not view_of(log[:3]).is_orphan("data/00000001/000000000005/bb", epoch=3)
    assert not fold(view, 4, None).is_orphan("data/00000001/000000000005/bb", epoch=3)


SUMMARY = unseal(encode_summary(view_of([EPOCH, generation(None), commit(1, 5, "a"), generation(None)])))


@given(st.sampled_from(sorted(SUMMARY)), st.sampled_from([None, -1, 1.5, "x", [], {}, [[1]], [None], {"a": -1}, True]))
def test_a_summary_with_a_right_hash_and_wrong_fields_is_damage(name: str, value: object) -> None:
    try:
        view = decode_summary(seal({**SUMMARY, name: value}))
    except LogDamaged:
        return
    assert unseal(encode_summary(view))[name] == value  # a value that may stand there
