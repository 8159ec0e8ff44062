"""Random numbers go on bit for bit, or by the documented rule."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from torch import nn

from resilient.checkpoint import rng, values
from resilient.errors import CheckpointDamaged


def draw():
    dropped = nn.functional.dropout(torch.ones(64), 0.5)
    return [random.gauss(0, 1), np.random.normal(), *dropped.tolist(), torch.rand(()).item()]


def test_all_generators_go_on_exactly_after_a_round_trip_through_bytes():
    draw()
    encoded = values.encode(rng.capture())
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draw() != expected
    rng.restore(values.decode(encoded))
    assert draw() == expected
    assert len(encoded) < 20_000


def test_capturing_draws_nothing():
    torch.manual_seed(5)
    rng.capture()
    a = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(a, torch.rand(3))


def test_another_layout_gets_reproducible_numbers_that_differ_by_rank_and_step():
    saved = rng.capture()

    def drawn(step, rank):
        rng.restore(values.decode(values.encode(rng.derive(saved, step=step, rank=rank))))
        return tuple(draw())

    assert drawn(3, 0) == drawn(3, 0)
    assert len({drawn(step, rank) for step in (3, 4) for rank in range(3)}) == 6
    rng.restore(saved)
    assert tuple(draw()) != drawn(3, 0)


def test_the_derivation_is_the_documented_one():
    saved = rng.capture()
    digest = hashlib.sha256(b"resilient.rng\0torch\x007\x002\0" + values.encode(saved)).digest()
    rng.restore(rng.derive(saved, step=7, rank=2))
    assert torch.initial_seed() == int.from_bytes(digest[:8], "little")


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
def test_a_damaged_state_is_refused_before_anything_changes(key):
    saved = rng.capture()
    before = values.encode(saved)
    other = {**rng.derive(saved, step=0, rank=0), key: b"?"}
    with pytest.raises(CheckpointDamaged, match="random number generators"):
        rng.restore(other)
    assert values.encode(rng.capture()) == before
