"""Decisions with real processes: all ranks stop or save at the same boundary."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.resilient.node.actors import Ranks
from tests.resilient.node.conftest import Run

Fork = Callable[..., Ranks]


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_at_different_steps_stop_at_the_same_boundary(run: Run, fork: Fork, nodes: int) -> None:
    ranks = fork(run.configs(4, nodes=nodes))
    ranks.connect()
    ranks.one(3, "request", kind="stop")  # from any rank, and before the loop has begun
    for rank in range(4):
        ranks.start(rank, "loop", first=100 + rank, step_s=0.001 * (rank + 1))
    results = ranks.finish(range(4))
    assert results == [results[0]] * 4
    assert results[0][1] == "stop"
    assert results[0][0] > 103
    ranks.each("close")


def test_saves_come_by_the_clock_again_and_again(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(2, save_every_s=0.1))
    ranks.connect()
    first = 0
    for _ in range(3):
        results = ranks.each("loop", first=first)
        assert results == [results[0]] * 2
        assert results[0][1] == "save"
        first = results[0][0] + 1


def test_a_rank_that_dies_does_not_hold_the_others(run: Run, fork: Fork) -> None:
    ranks = fork(run.configs(3))
    ranks.connect()
    ranks.one(0, "request", kind="save")  # by one that lives on: a wish can die with who had it
    for rank in (0, 1):
        ranks.start(rank, "loop", first=0, step_s=0.002)
    ranks.kill(2)  # it never began its loop, so until now nothing could be proposed
    results = ranks.finish([0, 1])
    assert results == [results[0]] * 2
    assert results[0][1] == "save"


def test_a_killed_keeper_leaves_no_rank_waiting_and_none_acting_alone(run: Run, fork: Fork) -> None:
    for round_ in range(3):
        ranks = fork(run.configs(2, save_every_s=0.02))
        (keeper, _) = ranks.connect()
        for rank in (0, 1):
            ranks.start(rank, "loop", first=0, until_s=0.6, step_s=0.004 + 0.003 * rank)
        time.sleep(0.018 + 0.004 * round_)  # about when the first proposal is made
        os.kill(keeper, signal.SIGKILL)
        (first, first_kind), (second, second_kind) = ranks.finish([0, 1])
        assert first_kind == second_kind
        assert first_kind is None or first == second
        ranks.end()
