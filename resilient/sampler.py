"""Data order for torch's DataLoader that survives restarts: its state is what was consumed, whatever was prefetched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from resilient.draws import Counted, Draws, Ledger, Loader, Sequence
from resilient.errors import LoopMisused, StateMismatch
from resilient.order import number
from resilient.world_view import MicroBatch, World, world

T = TypeVar("T")


class Sampler:
    """An endless sequence of samples, cut into global batches, each shared out among the ranks.

        sampler = resilient.Sampler(len(dataset), global_batch=256, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4, generator=torch.Generator())
        with resilient.context(url, state={..., "data": sampler}) as run:
            batches = sampler.batches(loader)            # after the restore
            for step in run.steps(10_000):
                batch = next(batches)                    # this rank's share of one global batch

    The order is a pure function of (seed, epoch, index): each sample once per epoch, the next epoch follows without
    a gap, and the world plays no part, so any number of ranks goes on with exactly the samples that are left.
    A global batch that the ranks do not divide is shared unevenly (by one at most): weight each sample by
    1 / global_batch. A rank without a sample gets one to run with, and must give it weight 0.

    What counts as consumed is what the loop has taken out of `batches(loader)`, or what `advance` was told; never
    what the loader has asked for, which workers' prefetching drives ahead. A loader that is iterated directly
    needs `advance()` after each step; without, saving is refused rather than wrong.
    DataLoader draws a seed from torch's global generator whenever it is iterated, which shifts dropout when a run
    goes on: give it a generator of its own, or use `loader(dataset)`, which does and also seeds each sample.
    """

    def __init__(
        self,
        size: int,
        global_batch: int,
        seed: int = 0,
        *,
        rank: int | None = None,
        world: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """`rank` and `world` default to torch.distributed's, else the launcher's, when iteration begins.

        Raises LoopMisused for sizes below one.
        """
        if size < 1 or global_batch < 1:
            raise LoopMisused(f"a sampler of {size} samples in batches of {global_batch}: both must be at least 1")
        if (rank is None) != (world is None) or (rank is not None and world is not None and not 0 <= rank < world):
            raise LoopMisused(f"rank {rank} of world {world}: give both or none, the rank below the world")
        self.size, self.global_batch, self.seed, self.shuffle = size, global_batch, seed, shuffle
        self._place = None if rank is None or world is None else World(rank=rank, size=world)
        self._ledger = Ledger()

    # ---- state
    @property
    def consumed(self) -> int:
        """Samples consumed by all ranks, over all epochs."""
        return self._ledger.consumed

    @property
    def epoch(self) -> int:
        """Complete passes over the data."""
        return self.consumed // self.size

    @property
    def place(self) -> World:
        """This rank among those that share each global batch."""
        return self._place or world()

    def state_dict(self) -> dict[str, Any]:
        """The number of samples consumed, and what must be the same for it to mean the same.

        Raises StateInvalid where that number is not known (a loader iterated directly, and no `advance`), or in the
        middle of a global batch.
        """
        return {"consumed": self._ledger.known(), "size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; iterators made before raise SamplerStale. Raises StateMismatch for another order."""
        own = {"size": self.size, "seed": self.seed, "shuffle": self.shuffle}
        differing = {name: (state.get(name), value) for name, value in own.items() if state.get(name) != value}
        consumed = state.get("consumed")
        if differing or type(consumed) is not int or consumed < 0:
            saved = ", ".join(f"{name} {then!r}, now {now!r}" for name, (then, now) in differing.items())
            raise StateMismatch(
                f"{consumed!r} samples of another order were consumed: saved with {saved}",
                where="resilient.Sampler",
                next="make the sampler as it was, or leave it out of the restore (only=...) to start over",
            )
        self._ledger.restore(consumed)

    # ---- iterating
    def __iter__(self) -> Iterator[list[int]]:
        """Dataset indices of this rank's share, one list per global batch: what `batch_sampler=` wants. Endless."""
        return self.draws(None)

    def passes(self, micro_batch: int) -> MicroBatches:
        """A `batch_sampler=` that cuts each share as `World.micro_batches` does, equally often on every rank."""
        return MicroBatches(self, micro_batch)

    @property
    def samples(self) -> Samples:
        """A `sampler=` of single indices; its `batch_size` must divide this rank's share."""
        return Samples(self)

    def batches(self, loader: Loader[T]) -> Iterator[T]:
        """Iterate a loader that draws from this sampler, counting what is taken. It must be the outermost iterator.

        Raises LoopMisused if the loader does not draw from this sampler; SamplerStale when used after a restore.
        """
        return Counted(loader, self._ledger, passes=_passes_of(self, loader), global_batch=self.global_batch)

    def advance(self, samples: int | None = None) -> None:
        """Count `samples` (default: one global batch) as consumed, for loaders that are iterated directly.

        Raises LoopMisused if that many were never asked for.
        """
        self._ledger.advance(self.global_batch if samples is None else samples)

    def end_step(self) -> None:
        """What `resilient.context` does after each step: `advance` if the loader is iterated directly and was used."""
        active = self._ledger.active
        if active is not None and active.counted_by is None and active.handed_out:
            self.advance()

    def shares(self, micro_batch: int | None) -> tuple[MicroBatch, ...]:
        """This rank's passes over each global batch."""
        return self.place.micro_batches(self.global_batch, micro_batch or self.global_batch)

    def draws(self, micro_batch: int | None, *, numbered: bool = False) -> Draws:
        """An iterator that goes on from what was consumed; earlier ones become stale."""
        sequence = Sequence(size=self.size, global_batch=self.global_batch, seed=self.seed, shuffle=self.shuffle)
        return Draws(sequence, self._ledger, self.shares(micro_batch), numbered=numbered)

    def loader(
        self, dataset: Dataset[T], *, micro_batch: int | None = None, seed_samples: bool = True, **options: Any
    ) -> DataLoader[T]:
        """A DataLoader that leaves the training's random numbers alone; `options` are DataLoader's.

        With `seed_samples` each `dataset[i]` runs with random numbers of its own (Python, NumPy, torch), drawn from
        (seed, position in the sequence): augmentations repeat exactly after a restart, with any number of workers.
        """
        if isinstance(dataset, IterableDataset):
            raise LoopMisused("an IterableDataset has no samples to choose from", next="use a map-style dataset")
        draws = MicroBatches(self, micro_batch, numbered=seed_samples)
        source: Any = _Seeded(dataset, self.seed) if seed_samples else dataset
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(source, batch_sampler=draws, generator=generator, **options)


class MicroBatches:
    """Batch sampler: the passes of each global batch in turn (the whole share, if `micro_batch` is None)."""

    def __init__(self, sampler: Sampler, micro_batch: int | None, *, numbered: bool = False) -> None:
        self.sampler, self._micro_batch, self._numbered = sampler, micro_batch, numbered

    def __iter__(self) -> Iterator[list[Any]]:
        return self.sampler.draws(self._micro_batch, numbered=self._numbered)

    @property
    def passes(self) -> int:
        """Batches per global batch."""
        return len(self.sampler.shares(self._micro_batch))


class Samples:
    """Sampler of single indices."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[int]:
        for indices in self.sampler.draws(None):
            yield from indices


def _passes_of(sampler: Sampler, loader: Any) -> int:
    batches, samples = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    if batches is sampler:
        return 1
    if isinstance(batches, MicroBatches) and batches.sampler is sampler:
        return batches.passes
    if isinstance(samples, Samples) and samples.sampler is sampler:
        share, size = sampler.place.share(sampler.global_batch)[1], loader.batch_size or 1
        if share and share % size == 0:
            return int(share // size)
        raise LoopMisused(
            f"batch_size {size} does not divide this rank's share of {share} samples",
            next="use batch_sampler=sampler, or sampler.passes(micro_batch)",
        )
    raise LoopMisused(
        "this loader does not draw from this sampler",
        next="make it with DataLoader(dataset, batch_sampler=sampler), or sampler.loader(dataset)",
    )


class _Seeded(Dataset[T], Generic[T]):
    """A dataset whose items draw from random numbers of their own."""

    def __init__(self, dataset: Dataset[T], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, drawn: tuple[int, int]) -> T:
        index, position = drawn
        if get_worker_info() is not None:
            self._set(position)
            return self._dataset[index]
        # In the training's own process its generators must be found as they were.
        python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            self._set(position)
            return self._dataset[index]
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(own)

    def _set(self, position: int) -> None:
        drawn = number(self._seed, position, "sample")
        random.seed(drawn)
        np.random.seed([drawn & 0xFFFF_FFFF, drawn >> 32])
        torch.default_generator.manual_seed(drawn)
