"""Cutting a rank's samples into passes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from resilient.world_view import World
from runtime.step import cut_passes


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5))
def test_every_sample_is_in_one_pass_and_all_ranks_run_as_many(ranks: int, batch: int, micro_batch: int) -> None:
    seen, numbers = [], set()
    for rank in range(ranks):
        place = World(rank=rank, size=ranks)
        first, count = place.share(batch)
        samples = torch.arange(first, first + count)[:, None].expand(-1, 3)
        passes = cut_passes(samples, place.micro_batches(batch, micro_batch))
        numbers.add(len(passes))
        assert all(1 <= len(one.samples) <= micro_batch for one in passes)
        seen += [int(sample[0]) for one in passes if one.weight for sample in one.samples]
    assert seen == list(range(batch))
    assert len(numbers) == 1
