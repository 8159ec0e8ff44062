"""Every layout trains the same model on the same batch."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.runtime.ranks import train

RANKS = "tests.runtime.ranks:train"


@functools.cache
def one_process(*overrides: str) -> dict[str, Any]:
    return train(None, list(overrides))


def assert_same_training(results: list[dict[str, Any]], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    for result in results:
        assert result["init"] == expected["init"]
        for mine, theirs in zip(result["steps"], expected["steps"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert result["val_loss"] == pytest.approx(expected["val_loss"], abs=tolerance)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (
            2,
            ["layout.replicate=2", "layout.shard=1", "train.global_batch=5", "train.micro_batch=1"],
        ),  # 3 and 2 + padding
        (2, ["layout.shard=2"]),
        (3, ["layout.shard=3"]),  # 8 samples: 3, 3, 2
        (4, ["layout.replicate=2", "layout.shard=2", "train.micro_batch=1"]),
    ],
    ids=["DP 2 padded", "FSDP 2", "FSDP 3 uneven", "HSDP 2x2 accumulating"],
)
def test_a_layout_trains_like_one_process(world, ranks: int, layout: list[str]) -> None:
    assert_same_training(
        world(ranks).run(RANKS, overrides=layout), one_process(*(item for item in layout if "batch" in item))
    )


def test_three_copies_wrapped_anew_go_on_bit_identically(world) -> None:
    # DDP's own rearranging of buckets after the first step broke this.
    overrides = ["layout.replicate=3", "layout.shard=1"]
    assert world(3).run("tests.runtime.ranks:train_and_wrap_anew", overrides=overrides) == [True] * 3


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    assert_same_training([train(None, ["train.micro_batch=3"])], one_process("train.micro_batch=8"))


def test_recomputed_activations_change_nothing() -> None:
    assert train(None, ["parallel.activation_checkpointing=full"]) == one_process()


def test_bfloat16_stays_near_float32() -> None:
    whole, half = one_process(), train(None, ["parallel.precision=bfloat16"])
    assert half["steps"] != whole["steps"]
    assert_same_training([half | {"init": whole["init"]}], whole | {"steps": half["steps"]}, tolerance=0.02)
    for mine, theirs in zip(half["steps"], whole["steps"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=0.02)
