"""What the contract says of the loop: restored, saved, stopped, broken off, failed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from resilient.log.run_log import RunLog
from storage.open import open_store
from tests.worlds import World, WorldFailed

TRAIN = "tests.resilient.loops:train"
Make = Callable[..., World]


def committed(url: Path) -> list[int]:
    return [commit.step for commit in RunLog(open_store(str(url))).read().commits]


@pytest.mark.parametrize(("layout", "size"), [("dp1", 1), ("fsdp2", 2)])
def test_a_stopped_and_restored_run_is_bit_identical_to_an_undisturbed_one(
    world: Make, tmp_path: Path, layout: str, size: int
) -> None:
    twin = world(size).run(TRAIN, url=str(tmp_path / "twin"), layout=layout, total=9)
    first = world(size).start(TRAIN, url=str(tmp_path / "run"), layout=layout, total=9, stop_at=4)
    assert {outcome.status for outcome in first.outcomes(60)} == {75}
    (stopped_at,) = committed(tmp_path / "run")[-1:]
    assert 5 <= stopped_at < 9
    again = world(size).run(TRAIN, url=str(tmp_path / "run"), layout=layout, total=9, seed=5)
    for rank in range(size):
        assert again[rank]["began"] == stopped_at
        assert again[rank]["digests"] == twin[rank]["digests"]
        assert again[rank]["rng"] == twin[rank]["rng"]
        after = {step: loss for step, loss in twin[rank]["losses"].items() if int(step) >= stopped_at}
        assert again[rank]["losses"] == after


@pytest.mark.parametrize("counted", [True, False], ids=["batches(loader)", "iter(loader)"])
def test_dropout_scheduler_and_a_loader_with_two_workers_go_on_bit_for_bit(
    world: Make, tmp_path: Path, *, counted: bool
) -> None:
    loop = "tests.resilient.loops:train_from_loader"
    common = {"layout": "fsdp2", "total": 20, "workers": 2, "counted": counted}
    twin = world(2).run(loop, url=str(tmp_path / "twin"), **common)
    first = world(2).start(loop, url=str(tmp_path / "run"), stop_at=4, **common)
    assert {outcome.status for outcome in first.outcomes(60)} == {75}
    again = world(2).run(loop, url=str(tmp_path / "run"), **common)
    for rank in range(2):
        assert 5 <= again[rank]["began"] < 20
        assert again[rank]["seen"] == twin[rank]["seen"][again[rank]["began"] :]
        assert again[rank]["digests"] == twin[rank]["digests"]
        assert again[rank]["rng"] == twin[rank]["rng"]
        assert again[rank]["consumed"] == 80


def test_the_end_of_steps_is_saved_and_committed_when_the_context_is_left(world: Make, tmp_path: Path) -> None:
    world(1).run(TRAIN, url=str(tmp_path), layout="dp1", total=5, every=2)
    assert committed(tmp_path) == [2, 4, 5]


def test_a_finished_run_is_restored_and_has_nothing_left_to_do(world: Make, tmp_path: Path) -> None:
    first = world(1).run(TRAIN, url=str(tmp_path), layout="dp1", total=4)
    again = world(1).run(TRAIN, url=str(tmp_path), layout="dp1", total=4, seed=5)
    assert again[0]["losses"] == {}
    assert again[0]["digests"] == first[0]["digests"]
    assert committed(tmp_path) == [2, 4]


def test_an_exception_goes_on_and_its_torn_step_is_not_saved(world: Make, tmp_path: Path) -> None:
    with pytest.raises(WorldFailed, match="ZeroDivisionError: told to"):
        world(2).run(TRAIN, url=str(tmp_path), layout="fsdp2", total=9, every=2, fail_at=4)
    assert committed(tmp_path) == [2, 4]


def test_break_leaves_the_current_step_incomplete(world: Make, tmp_path: Path) -> None:
    (left,) = world(1).run(TRAIN, url=str(tmp_path), layout="dp1", total=9, every=2, break_at=4)
    assert left["ended"] == 4
    assert committed(tmp_path) == [2, 4]
    (again,) = world(1).run(TRAIN, url=str(tmp_path), layout="dp1", total=9, break_at=4)
    assert again["began"] == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_rank_stops_all_after_the_same_step_saved(world: Make, tmp_path: Path, victim: int) -> None:
    handle = world(2).start(TRAIN, url=str(tmp_path), layout="fsdp2", total=500, every=400, sigterm_at=6, victim=victim)
    assert [outcome.status for outcome in handle.outcomes(60)] == [75, 75]
    (step,) = committed(tmp_path)
    assert 7 <= step < 500


def test_a_stop_with_the_flag_ends_the_loop_saved_and_without_an_exception(world: Make, tmp_path: Path) -> None:
    ends = world(2).run(TRAIN, url=str(tmp_path), layout="dp2", total=500, every=400, stop_at=3, on_preempt="flag")
    assert [end["stopping"] for end in ends] == [True, True]
    assert committed(tmp_path) == [ends[0]["ended"]] == [ends[1]["ended"]]


def run_script(body: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `body` as a user's own script would be: plain python, in a process of its own."""
    script = folder / "script.py"
    script.write_text("import torch, resilient\n" + textwrap.dedent(body))
    root = str(Path(__file__).parents[2])
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env=env, cwd=folder
    )


def test_a_framework_that_owns_the_loop_uses_open_and_close(tmp_path: Path) -> None:
    done = run_script(
        """
        state = {"values": {"weight": torch.zeros(3), "count": 0}}
        run = resilient.context("run", state=state, every=resilient.Every(steps=100)).open()
        while run.step < 3:
            run.begin_step()
            state["values"]["weight"] += 1
            state["values"]["count"] += 1
            run.end_step()
        assert run.save().result(30) == 3
        run.close()
        other = {"values": {"weight": torch.zeros(3), "count": 0}}
        with resilient.context("run", state=other, every=resilient.Every(steps=100)) as again:
            assert again.step == 3 and again.restored
        assert other["values"]["count"] == 3 and other["values"]["weight"].tolist() == [3.0] * 3
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_the_store_may_come_from_the_environment_and_a_missing_one_says_what_to_do(tmp_path: Path) -> None:
    body = """
        state = {"w": torch.zeros(2)}
        with resilient.context(state=state, every=resilient.Every(steps=1)) as run:
            for step in run.steps(2):
                with run.phase("evaluate"):
                    state["w"] += 1
    """
    missing = run_script(body, tmp_path)
    assert missing.returncode == 1
    assert "RESILIENT_STORE" in missing.stderr
    done = run_script(body, tmp_path, RESILIENT_STORE=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert committed(tmp_path / "run") == [1, 2]


def test_a_new_run_starts_from_another_runs_model_at_step_zero(tmp_path: Path) -> None:
    done = run_script(
        """
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with resilient.Checkpointer("first") as checkpointer:
            checkpointer.save(7, {"model": model, "optimizer": optimizer}).result(30)
        other = torch.nn.Linear(2, 2)
        init = resilient.From("first", only="model")
        state = {"model": other, "optimizer": torch.optim.SGD(other.parameters(), lr=0.5)}
        with resilient.context("second", state=state, every=resilient.Every(steps=1), init=init) as run:
            assert run.step == 0 and not run.restored
            assert torch.equal(other.weight, model.weight)
            assert state["optimizer"].param_groups[0]["lr"] == 0.5
            for step in run.steps(1):
                other.weight.data += 1
        third = torch.nn.Linear(2, 2)
        state = {"model": third, "optimizer": torch.optim.SGD(third.parameters(), lr=0.5)}
        with resilient.context("second", state=state, init=init) as run:
            assert run.step == 1, "its own commits come first"
            assert torch.equal(third.weight, other.weight)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_misuse_is_told_with_what_to_do(tmp_path: Path) -> None:
    done = run_script(
        """
        run = resilient.context("run", state={"w": torch.zeros(2)}, every=resilient.Every(steps=5)).open()
        bare = lambda: resilient.context("x", state={"n": 3}).open().save()
        for act, word in ((run.end_step, "begin_step"), (bare, "dict")):
            try:
                act()
            except resilient.ResilientError as error:
                assert word in str(error), error
            else:
                raise SystemExit(f"{word}: nothing was raised")
        run.begin_step()
        assert run.save() is None, "inside a step it is put off to the boundary"
        run.end_step()
        run.close()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert committed(tmp_path / "run") == [1]
