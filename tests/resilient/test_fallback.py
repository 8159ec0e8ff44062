"""A damaged store: a typed error, or the newest step that is whole, announced; never a wrong tensor."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

import resilient
from resilient.errors import CheckpointDamaged
from tests.resilient.training import digests, make_state, tokens_of, train_step

PLACES = 100
STEPS = (1, 2, 3)


def pick(root: Path, source: random.Random) -> Path:
    """Any file of the run, the kinds of object alike likely."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    kinds = {
        "log": [path for path in files if path.parent.name == "log"],
        "manifest": [path for path in files if path.name == "manifest"],
        "index": [path for path in files if path.name.endswith(".index")],
        "part": [path for path in files if path.suffix[1:].isdigit()],
    }
    assert all(kinds.values()), kinds
    return source.choice(kinds[source.choice(sorted(kinds))])


def damage(path: Path, source: random.Random) -> str:
    """Flip a bit, cut the tail, or take the object away."""
    data = bytearray(path.read_bytes())
    how = source.choice(("bit flipped", "tail cut", "gone"))
    path.unlink()
    if how == "bit flipped":
        at = source.randrange(len(data))
        data[at] ^= 1 << source.randrange(8)
        path.write_bytes(data)
    elif how == "tail cut":
        path.write_bytes(data[: source.randrange(len(data))])
    return f"{how}: {path.name}"


def test_damage_at_100_places_is_told_or_an_older_step_restored_and_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    whole, state, expected = tmp_path / "whole", make_state("dp1", seed=1), {}
    with resilient.Checkpointer(whole) as checkpointer:
        for step in STEPS:
            train_step(state, tokens_of(step))
            checkpointer.save(step, state).result(30)
            expected[step] = digests(state)
    source = random.Random(11)
    outcomes = {"error": 0, "older": 0, "newest": 0}
    for place in range(PLACES):
        root = tmp_path / f"damaged-{place}"
        shutil.copytree(whole, root)
        what = damage(pick(root, source), source)
        caplog.clear()
        target, told = make_state("dp1", seed=2), ""
        try:
            with caplog.at_level(logging.WARNING, logger="resilient"), resilient.Checkpointer(root) as checkpointer:
                step = checkpointer.restore(target)
        except resilient.ResilientError as error:
            outcomes["error"] += 1
            told = str(error)
            step = -1
        if step == -1:
            assert "Next:" in told, f"{what}: {told}"
        else:
            assert step is not None, f"{what}: a run that has commits was taken for empty"
            assert digests(target) == expected[step], f"{what}: wrong tensors"
            if step < max(STEPS):
                assert caplog.messages, f"{what}: step {step} was restored without a word"
            outcomes["older" if step < max(STEPS) else "newest"] += 1
        shutil.rmtree(root)
    assert outcomes["older"] > 10
    assert outcomes["newest"] > 10, "damage to older steps does not matter"


def test_an_explicit_step_that_is_damaged_is_an_error_and_not_another_step(tmp_path: Path) -> None:
    state = make_state("dp1", seed=1)
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for step in STEPS:
            train_step(state, tokens_of(step))
            checkpointer.save(step, state).result(30)
        (part,) = tmp_path.glob("data/*/000000000002/*/*.00000")
        part.unlink()
        with pytest.raises(CheckpointDamaged, match=r"00000"):
            checkpointer.restore(state, step=2)
        assert checkpointer.restore(state, step=1) == 1


def test_when_nothing_is_whole_the_error_names_every_step(tmp_path: Path) -> None:
    state = make_state("dp1", seed=1)
    with resilient.Checkpointer(tmp_path) as checkpointer:
        for step in STEPS[:2]:
            train_step(state, tokens_of(step))
            checkpointer.save(step, state).result(30)
        for manifest in tmp_path.glob("data/**/manifest"):
            manifest.write_bytes(b"{}")
        with pytest.raises(CheckpointDamaged, match=r"none of the 2 committed steps.*2 \(.*1 \("):
            checkpointer.restore(state)
