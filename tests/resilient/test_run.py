"""A run's boundaries, in one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import resilient
from resilient.errors import LoopMisused, StateInvalid
from resilient.log.run_log import RunLog
from storage.open import open_store


def committed(url: Path) -> list[int]:
    return [commit.step for commit in RunLog(open_store(str(url))).read().commits]


def context(url: Path, *, every: int = 1000, **options: Any) -> resilient.context:
    state = {"values": {"w": torch.zeros(2)}}
    return resilient.context(url, state=state, every=resilient.Every(steps=every), **options)


def test_the_best_step_is_the_one_that_was_evaluated_and_not_one_saved_after_it(tmp_path: Path) -> None:
    with context(tmp_path, every=10, keep=resilient.Keep(last=1, best=1, by="val_loss")) as run:
        for step in run.steps(60):
            if step == 19:
                run.report(val_loss=0.1)
            if step == 39:
                run.report(val_loss=0.5)
    assert committed(tmp_path) == [20, 60]


def test_a_stop_asked_for_too_late_to_be_decided_is_saved_at_the_close(tmp_path: Path) -> None:
    run = context(tmp_path, on_preempt="flag").open()
    for _ in range(3):
        run.begin_step()
        run.end_step()
    run.stop()
    run.close()
    assert run.stopping
    assert committed(tmp_path) == [3]


def test_after_a_break_saving_is_refused_and_the_step_can_be_run_again(tmp_path: Path) -> None:
    with context(tmp_path) as run:
        for step in run.steps(10):
            if step == 3:
                break
        with pytest.raises(LoopMisused, match="step 3 was broken off"):
            run.save()
        assert list(run.steps(6)) == [3, 4, 5]
    assert committed(tmp_path) == [6]


def test_saving_what_is_saved_already_gives_its_result(tmp_path: Path) -> None:
    with context(tmp_path) as run:
        for _ in run.steps(2):
            pass
        pending = run.save()
        assert pending is not None
        assert pending.result(30) == 2
    with context(tmp_path) as run:
        again = run.save()
        assert again is not None
        assert again.result(1) == 2
    assert committed(tmp_path) == [2]


def test_a_save_asked_for_inside_a_step_happens_at_its_end(tmp_path: Path) -> None:
    with context(tmp_path) as run:
        for step in run.steps(5):
            if step == 1:
                assert run.save() is None
    assert committed(tmp_path) == [2, 5]


def test_time_decides_through_rank_0s_clock(tmp_path: Path) -> None:
    state = {"values": {"w": torch.zeros(2)}}
    with resilient.context(tmp_path, state=state, every=resilient.Every(minutes=0.001)) as run:
        for _ in run.steps(10_000_000):
            if len(committed(tmp_path)) >= 2:
                break
    assert len(committed(tmp_path)) >= 2


def _run_until_signalled(run: resilient.Run) -> None:
    for step in run.steps(100_000):
        time.sleep(0.001)  # a step
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_that_comes_twice_is_one_wish_and_the_step_is_saved(tmp_path: Path) -> None:
    run = context(tmp_path).open()
    with pytest.raises(resilient.Preempted) as stopped:
        _run_until_signalled(run)
    run.leave(stopped.value)
    assert committed(tmp_path) == [run.step]
    os.kill(os.getpid(), signal.SIGTERM)  # until the process ends, as torchrun does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_what_cannot_be_saved_is_told_on_entering(tmp_path: Path) -> None:
    state = {"data": torch.utils.data.RandomSampler(range(3))}
    with pytest.raises(StateInvalid, match="RandomSampler"):
        resilient.context(tmp_path, state=state).open()


def test_a_loss_with_a_gradient_can_be_reported(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    with context(tmp_path) as run:
        for _ in run.steps(1):
            run.report(loss=torch.ones((), requires_grad=True) * 2)
    assert RunLog(open_store(str(tmp_path))).read().commits[0].metrics["loss"] == 2.0
    assert not [warning for warning in recwarn if "requires_grad" in str(warning.message)]
