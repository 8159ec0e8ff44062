"""Deaths of workers, of keepers and of everything: what was acknowledged stays, nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.errors import KeeperLost, SaveFailed, SaveUnknown
from tests.resilient.node.actors import ELEMENTS, Ranks, gone
from tests.resilient.node.conftest import Run

Fork = Callable[..., Ranks]
A, B, C = "a" * 16, "b" * 16, "c" * 16


def test_a_sealed_save_outlives_its_workers(run: Run, fork: Fork) -> None:
    """Large enough that it cannot be over when the last worker is killed."""
    elements = 4 << 20
    ranks = fork(run.configs(2), elements=elements)
    (keeper, _) = ranks.connect(buffers=1)
    ranks.each("fill", step=1)
    ranks.each("seal", step=1, nonce=A, fill=False)
    while not ranks.one(0, "state", nonce=A)["sealed"]:
        time.sleep(0.001)
    ranks.kill(0)
    ranks.kill(1)
    assert gone(keeper, 20.0)
    run.check(1, 2, elements)


def test_a_worker_killed_before_its_seal_voids_the_save_and_is_named(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(4))
    (keeper, *_) = ranks.connect()
    ranks.each("seal", [0, 1, 3], step=1, nonce=A)
    ranks.kill(2)
    for rank in (0, 1, 3):
        error = ranks.error(rank, "result", nonce=A)
        assert type(error) is SaveFailed
        assert "rank 2 (process" in error.what
    ranks.each("wait_free", [0, 1, 3], arena=0)
    ranks.one(0, "seal", step=2, nonce=B)  # nor can any later save become whole
    assert "rank 2" in ranks.error(0, "result", nonce=B).what
    ranks.each("close", [0, 1, 3])
    assert gone(keeper, 2.0)
    assert run.steps() == []


def test_a_worker_killed_on_another_node_is_named_everywhere(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(4, nodes=2))
    keepers = ranks.connect()
    ranks.each("seal", [0, 1, 2], step=1, nonce=A)
    ranks.kill(3)
    for rank in (0, 1, 2):
        error = ranks.error(rank, "result", nonce=A)
        assert type(error) is SaveFailed
        assert "rank 3 (process" in error.what
    ranks.each("close", [0, 1, 2])
    assert all(gone(keeper, 2.0) for keeper in keepers)


def test_a_dead_rank_is_seen_though_its_child_holds_its_sockets(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    ranks.connect()
    child = ranks.one(1, "fork_child")
    try:
        ranks.one(0, "seal", step=1, nonce=A)
        ranks.kill(1)
        assert "rank 1" in ranks.error(0, "result", nonce=A, timeout=2.0).what
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_killed_keeper_fails_every_save_at_once_and_another_one_starts(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2))
    (keeper, _) = ranks.connect()
    ranks.each("seal", step=1, nonce=A)
    ranks.each("result", nonce=A)
    ranks.one(0, "seal", step=2, nonce=B)
    os.kill(keeper, signal.SIGKILL)
    error = ranks.error(0, "result", nonce=B, timeout=2.0)
    assert type(error) is KeeperLost
    ranks.each("wait_lost")
    states = [ranks.one(rank, "state", nonce=A) for rank in (0, 1)]
    assert not any(state["alive"] for state in states)
    ranks.each("wait_free", arena=0)  # the dead read nothing
    ranks.one(1, "seal", step=3, nonce=C)
    assert type(ranks.error(1, "result", nonce=C)) is KeeperLost
    ranks.each("connect")
    ranks.each("seal", step=3, nonce=C)
    ranks.each("result", nonce=C)
    assert run.steps() == [1, 3]
    run.check(3, 2, ELEMENTS)


@pytest.mark.parametrize(
    ("point", "steps"),
    [
        ("keeper.sealed", [1]),
        ("writer.part", [1]),
        ("writer.index", [1]),
        ("manifest.before", [1]),
        ("commit.before_entry", [1]),
        ("commit.after_entry", [1, 2]),
        ("drop.before_entry", [1, 2]),
        ("drop.before_delete", [2]),
    ],
)
def test_a_keeper_killed_at_any_point_leaves_a_whole_newest_step(
    run: Run, fork: Fork, point: str, steps: list[int]
) -> None:
    passages = 1 if point.startswith("drop") else 2
    keep = {"last": 1} if point.startswith("drop") else None
    ranks = fork(run.configs(1, keep=keep), env={"RESILIENT_FAILPOINTS": f"{point}=kill@{passages}"})
    ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    ranks.one(0, "result", nonce=A)
    ranks.one(0, "seal", step=2, nonce=B, arena=1)
    ranks.one(0, "wait_lost")
    assert run.steps() == steps
    run.check(steps[-1], 1, ELEMENTS)


def test_a_killed_node_keeper_fails_the_save_on_the_other_node(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2, nodes=2))
    keepers = ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    os.kill(keepers[1], signal.SIGKILL)
    error = ranks.error(0, "result", nonce=A, timeout=2.0)
    assert type(error) is SaveFailed
    assert "node 1" in error.what
    ranks.one(1, "wait_lost")


def test_a_killed_coordinator_ends_the_other_keepers_and_tells_their_workers(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2, nodes=2))
    keepers = ranks.connect()
    ranks.one(1, "seal", step=1, nonce=A)
    ranks.one(1, "state", nonce=A)
    os.kill(keepers[0], signal.SIGKILL)
    error = ranks.error(1, "result", nonce=A, timeout=2.0)
    assert type(error) in (SaveUnknown, KeeperLost)
    ranks.each("wait_lost")
    assert gone(keepers[1], 2.0)


def test_everything_killed_at_random_moments_keeps_what_was_acknowledged(run: Run, fork: Fork) -> None:
    step = 0
    for round_ in range(3):
        ranks = fork(run.configs(2))
        (keeper, _) = ranks.connect()
        acknowledged = step
        for attempt in range(2):
            step += 1
            nonce = f"{round_:08x}{attempt:08x}"
            ranks.each("wait_free", arena=attempt)
            ranks.each("seal", step=step, nonce=nonce, arena=attempt)
            if attempt == 0:
                ranks.each("result", nonce=nonce)
                acknowledged = step
        time.sleep(0.003 * round_)
        for pid in (keeper, *ranks.pids):
            os.kill(pid, signal.SIGKILL)
        ranks.end()
        newest = run.steps()[-1]
        assert newest in (acknowledged, acknowledged + 1)
        run.check(newest, 2, ELEMENTS)
        step = newest


_HANGING_STORE = """
import time, storage.local
storage.local.LocalStore.put_if_absent = lambda *_: time.sleep(1000)
"""


def test_a_keeper_that_hangs_in_the_store_ends_by_its_deadline(run: Run, fork: Fork, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HANGING_STORE)
    ranks = fork(run.configs(1, linger_s=0.5), env={"PYTHONPATH": str(tmp_path)})
    (keeper,) = ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    while not ranks.one(0, "state", nonce=A)["sealed"]:
        time.sleep(0.001)
    ranks.kill(0)
    begun = time.monotonic()
    assert gone(keeper, 5.0)
    assert time.monotonic() - begun > 0.3  # it was given its time
    assert run.steps() == []


def test_a_job_that_is_ended_by_signals_still_gets_its_last_save(run: Run, fork: Fork) -> None:
    """As a scheduler does it: every process of the job gets the signal."""
    ranks = fork(run.configs(1))
    (keeper,) = ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(keeper, number)
    ranks.one(0, "result", nonce=A)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert gone(keeper, 5.0)
    run.check(1, 1, ELEMENTS)


def test_a_frozen_keeper_is_ended_by_its_workers(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1, silence_s=1.5))
    (keeper,) = ranks.connect()
    os.kill(keeper, signal.SIGSTOP)
    ranks.one(0, "seal", step=1, nonce=A)
    error = ranks.error(0, "result", nonce=A, timeout=10.0)
    assert type(error) is KeeperLost
    assert "no sign of life" in error.what
    assert gone(keeper, 2.0)
    ranks.one(0, "wait_free", arena=0)


def test_nothing_is_left_when_the_workers_are_killed_while_idle(run: Run, fork: Fork) -> None:
    before = _abstract_sockets()
    ranks = fork(run.configs(4, nodes=2))
    keepers = ranks.connect()
    assert len(_abstract_sockets() - before) >= 2
    for rank in range(4):
        ranks.kill(rank)
    assert all(gone(keeper, 3.0) for keeper in keepers)
    until = time.monotonic() + 2.0  # a leader is a zombie a moment before its last thread has closed the files
    while _abstract_sockets() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert _abstract_sockets() - before == set()


def test_a_closed_client_gives_everything_back(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(1))
    before = ranks.one(0, "descriptors")
    (keeper,) = ranks.connect()
    ranks.one(0, "seal", step=1, nonce=A)
    ranks.one(0, "close")
    assert gone(keeper, 1.0)
    assert ranks.one(0, "descriptors") == before
    assert run.steps() == [1]  # close waits for what is sealed


def _abstract_sockets() -> set[str]:
    with open("/proc/net/unix") as file:
        return {line.split()[-1] for line in file if "@resilient-" in line}
