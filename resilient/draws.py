"""Iterators over a sampler: what each hands out, and how much of it was consumed (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from resilient.errors import LoopMisused, SamplerStale, StateInvalid
from resilient.order import ordered
from resilient.world_view import MicroBatch

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Loader(Protocol[T_co]):
    """What `Sampler.batches` iterates: a DataLoader, or something like it."""

    def __iter__(self) -> Iterator[T_co]:
        """Batches."""


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The endless sequence of samples."""

    size: int
    global_batch: int
    seed: int
    shuffle: bool

    def take(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """(dataset indices, positions) of `count` samples from position `first`."""
        positions = np.arange(first, first + count, dtype=np.int64)
        return ordered(positions, self.size, self.seed, shuffle=self.shuffle), positions.tolist()


@dataclass
class Count:
    """Where a counted iterator is in the current global batch."""

    passes: int  # loader batches per global batch
    inside: int = 0  # taken of the current one


class Ledger:
    """How many samples were consumed, and which iterator is the one that goes on from there."""

    def __init__(self) -> None:
        self.consumed = 0
        self.restores = 0
        self.active: Draws | None = None
        self.counting: Count | None = None  # of the counted iterator that is being driven at this moment

    def restore(self, consumed: int) -> None:
        """Start over from there: every iterator made so far is stale."""
        self.consumed, self.active = consumed, None
        self.restores += 1

    def advance(self, samples: int) -> None:
        """Count samples for an iterator that does not count by itself. Raises LoopMisused."""
        active = self.active
        if active is not None and active.counted_by is not None:
            raise LoopMisused("sampler.batches(loader) counts what is taken", next="do not call advance() as well")
        if active is not None and self.consumed + samples > active.asked_for:
            raise LoopMisused(
                f"{self.consumed + samples} samples cannot be consumed: the loader has asked for {active.asked_for}",
                next="call advance() once per step",
            )
        if active is not None:
            active.accounted = True
        self.consumed += samples

    def known(self) -> int:
        """Samples consumed. Raises StateInvalid if that is not known, or in the middle of a global batch."""
        active = self.active
        if active is None or not active.handed_out:
            return self.consumed
        if not active.accounted:
            raise StateInvalid(
                f"the loader has asked for {active.handed_out} batches, and nobody says how many of them were consumed",
                where="resilient.Sampler",
                next="take them from sampler.batches(loader), or call sampler.advance() after each step",
            )
        if active.counted_by is not None and active.counted_by.inside:
            raise StateInvalid(
                f"{active.counted_by.inside} of {active.counted_by.passes} batches of this step were taken",
                where="resilient.Sampler",
                next="save between steps",
            )
        return self.consumed


class Draws:
    """Lists of dataset indices, or (numbered) of (index, position): one list per pass of this rank. Endless."""

    def __init__(
        self, sequence: Sequence, ledger: Ledger, shares: tuple[MicroBatch, ...], *, numbered: bool = False
    ) -> None:
        self._sequence, self._ledger, self._shares, self._numbered = sequence, ledger, shares, numbered
        self._start, self._restores = ledger.consumed, ledger.restores
        self.counted_by = ledger.counting
        self.accounted = self.counted_by is not None
        self.handed_out = 0  # batches
        self.asked_for = self._start  # samples of all ranks
        ledger.active = self

    def __iter__(self) -> Draws:
        return self

    def __next__(self) -> list[Any]:
        """Raises SamplerStale if a restore or a newer iterator has taken over."""
        if self._ledger.restores != self._restores:
            raise stale("before the state was restored")
        if self._ledger.active is not self:
            raise stale("before another iterator, which goes on from the same samples")
        batch, part = divmod(self.handed_out, len(self._shares))
        share, first = self._shares[part], self._start + batch * self._sequence.global_batch
        self.handed_out += 1
        self.asked_for = first + self._sequence.global_batch
        # A pass without a sample still needs one to run with: the batch's first, which weight 0 takes out again.
        low, count = (share.first, share.count) if share.count else (0, 1)
        indices, positions = self._sequence.take(first + low, count)
        return list(zip(indices, positions, strict=True)) if self._numbered else indices


class Counted(Iterator[T]):
    """A loader's batches, counted when they are taken; `passes` of them make a global batch."""

    def __init__(self, loader: Loader[T], ledger: Ledger, *, passes: int, global_batch: int) -> None:
        # Only the count is shared: a cycle through this object would keep the loader's workers alive.
        self._count = Count(passes)
        self._ledger, self._restores, self._global_batch = ledger, ledger.restores, global_batch
        self._iterator: Iterator[T] = self._driving(lambda: iter(loader))

    def __next__(self) -> T:
        """Raises SamplerStale after a restore."""
        if self._ledger.restores != self._restores:
            raise stale("before the state was restored")
        batch: T = self._driving(lambda: next(self._iterator))
        self._count.inside += 1
        if self._count.inside == self._count.passes:
            self._count.inside = 0
            self._ledger.consumed += self._global_batch
        return batch

    def _driving(self, act: Callable[[], Any]) -> Any:
        """Loaders ask for the sampler's iterator now or later: whenever it is, it must know who counts."""
        self._ledger.counting = self._count
        try:
            return act()
        finally:
            self._ledger.counting = None


def stale(when: str) -> SamplerStale:
    """The error for an iterator that must not be used any more."""
    return SamplerStale(
        f"this iterator was made {when}", where="resilient.Sampler", next="make a new one: sampler.batches(loader)"
    )
