"""Saving and restoring by hand, in one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import resilient
from resilient.errors import (
    CheckpointDamaged,
    Fenced,
    KeeperLost,
    LoopMisused,
    NoCheckpoint,
    SaveFailed,
    SettingInvalid,
    StateMismatch,
    StepExists,
)
from storage.errors import StoreError
from tests.processes import send


def state_of(value: float) -> dict[str, object]:
    return {"weights": {"w": torch.full((4, 3), float(value))}}


def weight(state: dict[str, object]) -> float:
    return state["weights"]["w"][0, 0].item()


def test_an_empty_run_restores_nothing_and_says_so(tmp_path: Path) -> None:
    state = state_of(1.0)
    with resilient.Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.restore(state) is None
        assert checkpointer.steps() == []
        with pytest.raises(NoCheckpoint, match="step 3 is not committed"):
            checkpointer.restore(state, step=3)
    assert weight(state) == 1.0


def test_a_saved_step_exists_and_is_replaced_only_on_request(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_of(1.0)).result(30)
        with pytest.raises(StepExists, match="step 1 is committed already"):
            checkpointer.save(1, state_of(2.0))
        checkpointer.save(1, state_of(3.0), replace=True).result(30)
        state = state_of(0.0)
        assert checkpointer.restore(state) == 1
        assert weight(state) == 3.0
    with resilient.Checkpointer(tmp_path) as later, pytest.raises(StepExists):
        later.save(1, state_of(2.0))


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    keep = resilient.Keep(last=2, best=1, by="val_loss")
    with resilient.Checkpointer(tmp_path, keep=keep) as checkpointer:
        for step, loss in enumerate([5.0, 1.0, 4.0, 3.0, 2.0], start=1):
            checkpointer.save(step, state_of(step), metrics={"val_loss": loss}).result(30)
    # What is not kept goes after the commit was told; leaving waits for it.
    with resilient.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [2, 4, 5]
        state = state_of(0.0)
        assert checkpointer.restore(state, step=2) == 2
        assert weight(state) == 2.0
    assert len({path.parent for path in tmp_path.glob("data/**/manifest")}) == 3


def test_what_the_loop_changes_after_save_returns_is_not_in_the_save(tmp_path: Path) -> None:
    state = {"weights": {"w": torch.zeros(1 << 20)}}
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for step in range(1, 6):
            state["weights"]["w"].fill_(step)
            checkpointer.save(step, state)
            state["weights"]["w"].fill_(-1.0)
            state["weights"]["w"].numpy()[:] = -2.0
        for step in range(1, 6):
            checkpointer.restore(state, step=step)
            assert state["weights"]["w"].eq(step).all()


def test_a_step_that_was_left_behind_by_an_explicit_restore_can_be_saved_again(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state_of(step)).result(30)
        assert checkpointer.restore(state_of(0.0), step=1) == 1
        checkpointer.save(2, state_of(20.0)).result(30)
        assert checkpointer.steps() == [1, 2]
        state = state_of(0.0)
        assert checkpointer.restore(state) == 2
        assert weight(state) == 20.0


def test_a_keeper_that_is_killed_fails_its_saves_and_the_next_save_has_another(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore(state_of(0.0)) is None
        checkpointer.save(1, state_of(1.0)).result(30)
        client = checkpointer._saver.client
        send(client.keeper_pid, 19)  # SIGSTOP: so that the save is certainly pending
        pending = checkpointer.save(2, state_of(2.0))
        send(client.keeper_pid, 9)
        with pytest.raises(KeeperLost):
            pending.result(30)
        checkpointer.save(3, state_of(3.0)).result(30)
        assert checkpointer.steps() == [1, 3]


def test_a_failure_that_nobody_asked_for_is_told_when_the_checkpointer_is_left(tmp_path: Path) -> None:
    root = tmp_path / "run"
    checkpointer = resilient.Checkpointer(root)
    checkpointer.__enter__()
    checkpointer.save(1, state_of(1.0)).result(30)
    shutil.rmtree(root)
    root.write_text("a file where the run was")
    checkpointer.save(2, state_of(2.0))
    with pytest.raises((SaveFailed, StoreError)):
        checkpointer.__exit__(None, None, None)


def test_a_state_that_does_not_fit_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state_of(1.0)).result(30)
        for other in (
            {"weights": {"w": torch.zeros(3, 4)}},
            {"weights": {"w": torch.zeros(4, 3, dtype=torch.float64)}},
            {"weights": {"v": torch.zeros(4, 3)}},
        ):
            with pytest.raises(StateMismatch, match="weights/"):
                checkpointer.restore(other)
            assert all(not tensor.any() for tensor in other["weights"].values())
        partial = {"weights": {"w": torch.zeros(4, 3)}, "more": {"n": torch.ones(2)}}
        assert checkpointer.restore(partial, strict=False) == 1
        assert any(item.startswith("more: not in the checkpoint") for item in checkpointer.last_restored.left_out)


def test_random_numbers_go_on_and_a_partial_restore_leaves_them_alone(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        torch.manual_seed(3)
        checkpointer.save(1, state_of(1.0)).result(30)
        expected = torch.rand(4)
        checkpointer.restore(state_of(0.0))
        assert torch.equal(torch.rand(4), expected)
        torch.manual_seed(4)
        after = torch.rand(4)
        torch.manual_seed(4)
        checkpointer.restore(state_of(0.0), only="weights")
        assert torch.equal(torch.rand(4), after)


def test_wrong_options_say_what_would_be_right(tmp_path: Path) -> None:
    for options in ({"codec": "zip"}, {"when_busy": "maybe"}, {"buffers": 0}):
        with pytest.raises(LoopMisused, match="Next: codec is"):
            resilient.Checkpointer(tmp_path, **options)


def test_every_public_name_stays_what_it_is_when_its_module_is_imported() -> None:
    for name in resilient.__all__:
        assert callable(getattr(resilient, name)), name
    assert resilient.world().size == 1


def test_a_damaged_newest_step_is_skipped_in_the_record_of_the_restore(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state_of(step)).result(30)
        (manifest,) = tmp_path.glob("data/*/000000000002/*/manifest")
        manifest.unlink()
        assert checkpointer.restore(state_of(0.0)) == 1
        assert checkpointer.last_restored.skipped == (2,)
        with pytest.raises(CheckpointDamaged):
            checkpointer.restore(state_of(0.0), step=2)


def test_a_job_that_wakes_up_late_does_not_undo_what_its_successor_saved(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as first:
        first.save(1, state_of(1.0)).result(30)
    late = resilient.Checkpointer(tmp_path)
    assert late.restore(state_of(0.0)) == 1
    with resilient.Checkpointer(tmp_path) as successor:
        successor.restore(state_of(0.0))
        successor.save(2, state_of(2.0)).result(30)
        with pytest.raises(Fenced, match="step 2 was committed by others"):
            late.save(5, state_of(5.0)).result(30)
        late.close()
        successor.save(3, state_of(3.0)).result(30)
        assert successor.steps() == [1, 2, 3]


def test_a_job_that_still_runs_is_fenced_by_one_that_took_over(tmp_path: Path) -> None:
    former = resilient.Checkpointer(tmp_path)
    former.save(1, state_of(1.0)).result(30)
    with resilient.Checkpointer(tmp_path) as successor:
        assert successor.restore(state_of(0.0)) == 1
        successor.save(2, state_of(2.0)).result(30)
        with pytest.raises(Fenced):
            former.save(9, state_of(9.0)).result(30)
        former.close()
        assert successor.steps() == [1, 2]


@pytest.mark.parametrize("step", [-1, 1.5, "1", True, None, 2**63])
def test_a_step_that_is_no_number_of_steps_is_refused_before_anything_is_sent(tmp_path: Path, step: object) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(SettingInvalid, match="completed steps"):
            checkpointer.save(step, state_of(1.0))
        checkpointer.save(torch.tensor(7), state_of(1.0)).result(30)
        assert checkpointer.steps() == [7]


def test_metrics_are_numbers_and_what_is_none_is_named(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for bad in ({"a": "x"}, {1: 2.0}, {"a": torch.ones(2)}, {"": 1.0}):
            with pytest.raises(SettingInvalid):
                checkpointer.save(1, state_of(1.0), metrics=bad)
        checkpointer.save(1, state_of(1.0), metrics={"loss": torch.tensor(0.5), "worst": float("nan")}).result(30)
        checkpointer.save(2, state_of(1.0)).result(30)
        checkpointer.save(3, state_of(1.0)).result(30)
        assert checkpointer.steps() == [1, 2, 3]


def test_an_expanded_tensor_comes_back(tmp_path: Path) -> None:
    with resilient.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"values": {"e": torch.arange(3.0).reshape(3, 1).expand(3, 4)}}).result(30)
        target = {"values": {"e": torch.zeros(3, 1).expand(3, 4)}}
        assert checkpointer.restore(target) == 1
        assert target["values"]["e"].tolist() == [[float(row)] * 4 for row in range(3)]


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    def made(kind: type[torch.optim.Optimizer]) -> dict[str, object]:
        model = torch.nn.Linear(2, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    with resilient.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, made(torch.optim.SGD)).result(30)
        with pytest.raises(StateMismatch, match="saved by SGD, but the live optimizer is AdamW"):
            checkpointer.restore(made(torch.optim.AdamW))
        assert checkpointer.restore(made(torch.optim.AdamW), only="model") == 1


def test_a_closed_checkpointer_says_so(tmp_path: Path) -> None:
    checkpointer = resilient.Checkpointer(tmp_path)
    checkpointer.close()
    checkpointer.close()
    for act in (checkpointer.steps, lambda: checkpointer.restore({}), lambda: checkpointer.save(1, state_of(1.0))):
        with pytest.raises(LoopMisused, match="closed"):
            act()


def test_a_place_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="this is a file"):
        resilient.Checkpointer(tmp_path / "file")
    checkpointer = resilient.Checkpointer("/proc/nowhere/run")
    with pytest.raises(StoreError, match="cannot be made"):
        checkpointer.save(1, state_of(1.0)).result(20)
    checkpointer.close()
