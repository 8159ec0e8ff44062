"""The world as the user's script sees it before the model exists: rank, size, generation, shares of a batch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.distributed as dist

from resilient.errors import LoopMisused


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of one rank: samples `first` .. `first + count` of the global batch.

    `count` is 0 for a padding pass: it must still be run (with any sample and weight 0), because sharded
    models hang when ranks run different numbers of passes.
    """

    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place in the run."""

    rank: int
    size: int
    local_rank: int = 0
    generation: int | None = None  # formation of the world, where a launcher counts them
    layout: Mapping[str, int] = field(default_factory=dict)  # sizes of the mesh's axes, where a planner chose them

    def share(self, global_batch: int) -> tuple[int, int]:
        """(first sample, number of samples) of the global batch that are this rank's; shares differ by at most one."""
        base, extra = divmod(global_batch, self.size)
        return self.rank * base + min(self.rank, extra), base + (self.rank < extra)

    def micro_batches(self, global_batch: int, micro_batch: int) -> tuple[MicroBatch, ...]:
        """This rank's passes over its share: the same number on every rank, at most `micro_batch` samples each.

        Weight each sample by 1 / global_batch in the summed loss, and the global batch stays the same
        for any world size, whether it divides or not. Raises LoopMisused for sizes below one.
        """
        if global_batch < 1 or micro_batch < 1:
            raise LoopMisused(f"global_batch {global_batch} and micro_batch {micro_batch} must both be at least 1")
        first, count = self.share(global_batch)
        largest = -(-global_batch // self.size)
        passes = -(-largest // micro_batch)
        starts = [min(index * micro_batch, count) for index in range(passes + 1)]
        return tuple(MicroBatch(first=first + start, count=stop - start) for start, stop in itertools.pairwise(starts))


def world() -> World:
    """The world from torch.distributed where it is initialised, else from the environment that launchers set."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    generation = os.environ.get("RESILIENT_GENERATION")
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        generation=int(generation) if generation else None,
        layout={"ranks": size},
    )
