"""The keeper with real processes: saves become commits, or fail for a reason that names the culprit."""

from __future__ import annotations

from collections.abc import Callable

from resilient.errors import Fenced, RanksDisagree, SaveFailed, SnapshotTorn, StepExists, TimedOut
from storage.errors import StoreError
from storage.failpoint import FailpointReached
from tests.resilient.node.actors import ELEMENTS, Ranks, gone
from tests.resilient.node.conftest import Run

Fork = Callable[..., Ranks]
A, B, C, D = "a" * 16, "b" * 16, "c" * 16, "d" * 16


def test_a_save_of_one_rank_is_committed_and_reads_back(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1))
    (keeper,) = ranks.connect()
    ranks.one(0, "seal", step=10, nonce=A)
    assert ranks.one(0, "state", nonce=A)["staged"]
    result = ranks.one(0, "result", nonce=A)
    assert result["step"] == 10
    run.check(10, 1, ELEMENTS)
    ranks.one(0, "close")
    assert gone(keeper, 2.0)


def test_four_ranks_save_several_steps_in_order(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(4))
    keepers = ranks.connect()
    assert len(set(keepers)) == 1
    for step, nonce, arena in ((1, A, 0), (2, B, 1)):
        ranks.each("seal", step=step, nonce=nonce, arena=arena)
    slots = [ranks.each("result", nonce=nonce) for nonce in (A, B)]
    assert all(results == [results[0]] * 4 for results in slots)
    assert slots[0][0]["slot"] < slots[1][0]["slot"]
    assert slots[0][0]["generation"] == slots[1][0]["generation"]
    for step in (1, 2):
        run.check(step, 4, ELEMENTS)
    ranks.each("close")
    assert gone(keepers[0], 2.0)


def test_two_nodes_commit_one_checkpoint(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(4, nodes=2))
    keepers = ranks.connect()
    assert len(set(keepers)) == 2
    ranks.each("seal", step=5, nonce=A, metrics={"loss": 0.5})
    assert len({str(result) for result in ranks.each("result", nonce=A)}) == 1
    run.check(5, 4, ELEMENTS)
    commit = run.log().find(5)
    assert commit is not None
    assert commit.metrics == {"loss": 0.5}
    ranks.each("close")
    assert all(gone(keeper, 2.0) for keeper in keepers)


def test_buffers_are_given_back_and_used_again(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect(buffers=1)
    for step in range(1, 5):
        ranks.each("wait_free", arena=0)
        ranks.each("seal", step=step, nonce=f"{step:016x}")
    ranks.each("result", nonce=f"{4:016x}")
    for step in range(1, 5):
        run.check(step, 2, ELEMENTS)
    ranks.each("close")


def test_a_result_that_is_not_there_yet_is_a_time_out_and_not_the_end(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    assert type(ranks.error(0, "result", nonce=A, timeout=0.05)) is TimedOut
    state = ranks.one(0, "state", nonce=A)
    assert state == {"staged": True, "sealed": False, "done": False, "free": False, "alive": True}
    ranks.one(1, "seal", step=1, nonce=A)
    ranks.each("result", nonce=A)
    run.check(1, 2, ELEMENTS)


def test_a_step_that_exists_is_refused_unless_replaced(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect()
    ranks.each("seal", step=1, nonce=A)
    first = ranks.each("result", nonce=A)[0]
    ranks.each("seal", step=1, nonce=B, arena=1)
    for rank in (0, 1):
        assert type(ranks.error(rank, "result", nonce=B)) is StepExists
    ranks.each("wait_free", arena=1)
    ranks.each("seal", step=1, nonce=C, arena=1, replace=True)
    assert ranks.each("result", nonce=C)[0]["slot"] > first["slot"]
    ranks.each("close")
    assert run.steps() == [1]
    run.check(1, 2, ELEMENTS)
    assert not run.objects(A)  # the new one is committed, so the old one was dropped and deleted


def test_keep_drops_old_steps_and_deletes_their_objects(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1, keep={"last": 2}))
    ranks.connect()
    for step in range(1, 6):
        ranks.one(0, "wait_free", arena=0)
        ranks.one(0, "seal", step=step, nonce=f"{step:016x}")
    ranks.one(0, "result", nonce=f"{5:016x}")
    ranks.one(0, "close")
    assert run.steps() == [4, 5]
    assert [bool(run.objects(f"{step:016x}")) for step in range(1, 6)] == [False, False, False, True, True]
    run.check(4, 1, ELEMENTS)


def test_a_restore_in_between_opens_a_generation_that_leaves_later_steps_behind(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1))
    ranks.connect()
    generation = -1
    for step, nonce in ((1, A), (2, B)):
        ranks.one(0, "seal", step=step, nonce=nonce)
        generation = ranks.one(0, "result", nonce=nonce)["generation"]
    restored = [generation, 1]
    ranks.one(0, "seal", step=3, nonce=C, restored=restored, formation=1)
    assert ranks.one(0, "result", nonce=C)["generation"] > generation
    assert run.steps() == [1, 3]  # 2 was left behind
    ranks.one(0, "seal", step=2, nonce=D, restored=[generation, 1], formation=2)
    ranks.one(0, "result", nonce=D)
    assert run.steps() == [1, 2]


def test_a_torn_snapshot_fails_on_all_ranks_for_that_reason(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(4, nodes=2))
    ranks.connect()
    ranks.each("seal", [0, 1, 2], step=1, nonce=A)
    ranks.one(3, "void", step=1, nonce=A, what="tensor model/w changed under the snapshot")
    for rank in (0, 1, 2):
        error = ranks.error(rank, "result", nonce=A)
        assert type(error) is SnapshotTorn
        assert "model/w" in error.what
    ranks.one(3, "seal", step=1, nonce=A)  # too late: it hears the same
    assert type(ranks.error(3, "result", nonce=A)) is SnapshotTorn
    ranks.each("wait_free", arena=0)
    assert run.steps() == []
    ranks.each("seal", step=2, nonce=B)
    ranks.each("result", nonce=B)
    run.check(2, 4, ELEMENTS)


def test_ranks_that_disagree_do_not_make_a_checkpoint(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    ranks.one(1, "seal", step=1, nonce=A, replace=True)
    for rank in (0, 1):
        assert type(ranks.error(rank, "result", nonce=A)) is RanksDisagree


def test_a_rank_that_skips_a_save_fails_it_for_the_others(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    ranks.each("seal", step=2, nonce=B, arena=1)
    error = ranks.error(0, "result", nonce=A)
    assert type(error) is SaveFailed
    assert "rank 1" in error.what
    ranks.each("result", nonce=B)
    run.check(2, 2, ELEMENTS)


def test_a_rank_that_never_seals_fails_the_save_after_a_while(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2, seal_timeout_s=0.3))
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    error = ranks.error(0, "result", nonce=A)
    assert type(error) is SaveFailed
    assert "[1]" in error.what


def test_a_second_run_on_the_same_store_fences_the_first(run: Run, fork: Fork) -> None:
    first, second = fork(run.configs(1)), fork(run.configs(1))
    first.connect()
    second.connect()
    first.one(0, "seal", step=1, nonce=A)
    first.one(0, "result", nonce=A)
    second.one(0, "seal", step=2, nonce=B)
    second.one(0, "result", nonce=B)
    for step, nonce in ((3, C), (4, D)):
        first.one(0, "seal", step=step, nonce=nonce)
        assert type(first.error(0, "result", nonce=nonce)) is Fenced
    assert run.steps() == [1, 2]


def test_an_unwritable_store_is_a_typed_error(run: Run, fork: Fork) -> None:
    run.path.parent.mkdir(exist_ok=True)
    run.path.write_bytes(b"a file where a directory should be")
    ranks = fork(run.configs(1))
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    assert isinstance(ranks.error(0, "result", nonce=A), StoreError)
    assert ranks.one(0, "state", nonce=A)["alive"]


def test_saves_go_on_after_one_that_failed(run: Run, fork: Fork) -> None:
    for point in ("keeper.sealed", "writer.part", "commit.before_entry"):
        ranks = fork(run.configs(1), env={"RESILIENT_FAILPOINTS": f"{point}=raise@1"})
        ranks.connect()
        ranks.one(0, "seal", step=1, nonce=A, replace=True)
        error = ranks.error(0, "result", nonce=A)
        assert type(error) is FailpointReached
        assert point in error.what
        ranks.one(0, "wait_free", arena=0)
        ranks.one(0, "seal", step=1, nonce=B, replace=True)
        ranks.one(0, "result", nonce=B)
        run.check(1, 1, ELEMENTS)
        ranks.one(0, "close")
