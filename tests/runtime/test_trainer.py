"""Whole runs: trained, saved, gone on with in the same and in other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import runtime.__main__ as command
from runtime.config import Config
from runtime.settings import read_config
from runtime.trainer import Outcome, train
from tests.template import Rank

SMALL = """
[model]
preset = "test"
dropout = 0.1
[data]
max_megabytes = 0.5
validation_percent = 20
sequence_length = 32
[train]
global_batch = 8
steps = 5
[optimizer]
eps = 1e-6
[schedule]
shape = "constant"
warmup_steps = 2
[evaluate]
every_steps = 5
samples = 10
[checkpoint]
every_steps = 2
[output]
text_bytes = 5
progress = "lines"
"""


def a_config(directory: Path, *overrides: str, url: Path | None = None) -> Config:
    where = [f"output.directory={directory}", f"checkpoint.url={url or directory / 'checkpoints'}"]
    return read_config(SMALL, [*where, *overrides])


def lines(directory: Path, rank: int = 0, event: str = "step") -> list[dict[str, Any]]:
    text = (directory / f"metrics-{rank:05d}.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["event"] == event]


def train_in_a_rank(rank: Rank, directory: str, url: str, overrides: list[str]) -> dict[str, Any]:
    outcome = train(a_config(Path(directory), *overrides, url=Path(url)))
    return {"step": outcome.step, "restored": outcome.restored_step, "val_loss": outcome.val_loss, "text": outcome.text}


def test_a_run_gone_on_with_is_bit_identical_dropout_and_loader_workers_included(tmp_path: Path) -> None:
    workers = "data.workers=2"
    whole = train(a_config(tmp_path / "whole", workers))
    train(a_config(tmp_path / "cut", workers, "train.steps=3"))
    rest = train(a_config(tmp_path / "cut", workers))
    assert (rest.step, rest.restored_step, whole.restored_step) == (5, 3, None)
    ours, theirs = lines(tmp_path / "cut"), lines(tmp_path / "whole")
    for key in ("step", "loss", "grad_norm", "lr", "samples"):
        assert [line[key] for line in ours] == [line[key] for line in theirs], key
    assert (rest.val_loss, rest.text) == (whole.val_loss, whole.text)


def test_a_finished_run_says_so_and_trains_no_further(tmp_path: Path) -> None:
    train(a_config(tmp_path, "train.steps=2"))
    again: Outcome = train(a_config(tmp_path, "train.steps=2"))
    assert (again.step, again.restored_step, again.loss) == (2, 2, None)
    assert len(lines(tmp_path)) == 2


def test_a_run_goes_on_in_other_layouts_as_if_undisturbed(world, tmp_path: Path) -> None:
    still = ["model.dropout=0.0", "train.micro_batch=2", "output.digests=true", "evaluate.samples=0"]
    train(a_config(tmp_path / "whole", *still, "train.steps=4"))
    expected = {line["step"]: line for line in lines(tmp_path / "whole")}
    seen: dict[int, list[int]] = {}
    sessions = [
        (3, ["layout.shard=3", "train.steps=2"]),
        (2, ["layout.replicate=2", "layout.shard=1", "train.steps=4"]),
    ]
    for number, (ranks, layout) in enumerate(sessions):
        here = tmp_path / str(number)
        results = world(ranks).run(
            "tests.runtime.test_trainer:train_in_a_rank",
            directory=str(here),
            url=str(tmp_path / "run"),
            overrides=[*still, *layout],
        )
        assert [result["restored"] for result in results] == [number * 2 or None] * ranks
        assert len({result["text"] for result in results}) == 1
        for back in lines(here, event="restored"):
            assert back["saved"] == back["restored"]
            assert len(back["saved"]) > 40
        for rank in range(ranks):
            for line in lines(here, rank):
                assert line["loss"] == pytest.approx(expected[line["step"]]["loss"], abs=1e-5)
                seen.setdefault(line["step"], []).extend(line["samples"])
    assert {step: sorted(samples) for step, samples in seen.items()} == {
        step: sorted(line["samples"]) for step, line in expected.items()
    }


def test_the_command_answers_with_one_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "small.toml"
    config.write_text(SMALL)
    assert command.main([str(config), "train.steps=2", f"output.directory={tmp_path}/run", "--json"]) == 0
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    answer = json.loads(line)
    assert (answer["step"], answer["restored_step"]) == (2, None)
    assert answer["loss"] == lines(tmp_path / "run")[-1]["loss"]
    assert answer["val_loss"] == lines(tmp_path / "run", event="evaluate")[-1]["val_loss"]
    assert Path(answer["checkpoints"]).is_dir()
    assert answer["text"].startswith("def ")
    assert "step      1/2  loss" in output.err


def test_a_line_of_metrics_holds_what_a_proof_needs(tmp_path: Path) -> None:
    train(a_config(tmp_path, "train.steps=1"))
    (line,) = lines(tmp_path)
    assert (line["v"], line["step"], line["rank"], line["ranks"], line["tokens"]) == (1, 1, 0, 1, 8 * 32)
    assert len(set(line["samples"])) == 8
    assert line["lr"] == 0.0005
    assert line["loss"] == pytest.approx(5.5, abs=0.3)
    assert {"grad_norm", "step_s", "tokens_per_s", "layout", "generation", "session_ns", "wall_ns"} <= line.keys()
