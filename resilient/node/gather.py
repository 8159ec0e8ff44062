"""What the ranks of one node have sealed: when a save is whole on this node, and when it never will be (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resilient.checkpoint.items import Slot
from resilient.errors import RanksDisagree, SaveFailed
from resilient.node.messages import Facts, SaveId, Value
from storage.errors import ResilientError

_REMEMBERED = 256


@dataclass(frozen=True, kw_only=True)
class Sealed:
    """One rank's part of a save."""

    facts: Facts
    memory: memoryview
    slots: tuple[Slot, ...]
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Every rank of the node has sealed the save."""

    save: SaveId
    parts: Mapping[int, Sealed]  # by local rank


@dataclass(frozen=True, kw_only=True)
class Void:
    """The save cannot be completed on this node."""

    save: SaveId
    error: ResilientError


@dataclass
class _Open:
    until_s: float
    parts: dict[int, Sealed] = field(default_factory=dict)
    order: dict[int, int] = field(default_factory=dict)  # which of all seals each was


class Gathering:
    """Collects seals. Its methods take what happened and return what follows from it."""

    def __init__(self, ranks: Mapping[int, int], *, seal_timeout_s: float) -> None:
        """ranks: global rank by local rank; may be corrected while it is used."""
        self._ranks, self._timeout_s = ranks, seal_timeout_s
        self._open: dict[SaveId, _Open] = {}
        self._gone: dict[int, str] = {}  # local rank -> why
        self._ended: dict[SaveId, ResilientError] = {}
        self._seals = 0

    @property
    def waiting(self) -> tuple[SaveId, ...]:
        """Saves that some rank has sealed and not every one."""
        return tuple(self._open)

    def seal(self, local: int, save: SaveId, part: Sealed, now_s: float) -> list[Whole | Void]:
        """A rank has sealed its part."""
        if save in self._ended:
            return [Void(save=save, error=self._ended[save])]
        entry = self._open.setdefault(save, _Open(until_s=now_s + self._timeout_s))
        self._seals += 1
        entry.parts[local], entry.order[local] = part, self._seals
        results = self._skipped(save)
        first = next(iter(entry.parts.values()))
        if part.facts.shared() != first.facts.shared():
            return [*results, *self.void(save, _disagree(save, self._ranks[local]))]
        missing = sorted(self._ranks.keys() - entry.parts.keys())
        if not missing:
            del self._open[save]
            self._end(save, SaveFailed(f"step {save.step} was sealed a second time", where=f"nonce {save.nonce}"))
            return [*results, Whole(save=save, parts=entry.parts)]
        for other in missing:
            if other in self._gone:
                return [*results, *self.void(save, self._lost(save, other))]
        return results

    def gone(self, local: int, why: str) -> list[Whole | Void]:
        """A rank has ended; what it has sealed stays good, what it has not will never be whole."""
        self._gone.setdefault(local, why)
        lost = [save for save, entry in self._open.items() if local not in entry.parts]
        return [void for save in lost for void in self.void(save, self._lost(save, local))]

    def void(self, save: SaveId, error: ResilientError) -> list[Whole | Void]:
        """Somebody gives the save up."""
        if save in self._ended:
            return []
        self._open.pop(save, None)
        self._end(save, error)
        return [Void(save=save, error=error)]

    def tick(self, now_s: float) -> list[Whole | Void]:
        """Give up what waits too long."""
        results: list[Whole | Void] = []
        for save, entry in list(self._open.items()):
            if now_s >= entry.until_s:
                missing = [self._ranks[local] for local in sorted(self._ranks.keys() - entry.parts.keys())]
                results += self.void(
                    save,
                    SaveFailed(
                        f"ranks {missing} did not seal step {save.step} within {self._timeout_s:g} s of the first",
                        next="see what these ranks do; call save on every rank",
                    ),
                )
        return results

    def _skipped(self, save: SaveId) -> list[Whole | Void]:
        """Void what a rank has skipped.

        All ranks save in the same order, but messages of different ranks overtake each other: that an open save
        comes before this one is known from a rank that has sealed both.
        """
        results: list[Whole | Void] = []
        mine = self._open[save].order
        for other, entry in list(self._open.items()):
            before = any(entry.order[local] < mine[local] for local in entry.order.keys() & mine.keys())
            skipped = sorted(mine.keys() - entry.order.keys())
            if other != save and before and skipped:
                what = f"rank {self._ranks[skipped[0]]} sealed step {save.step} without having sealed step {other.step}"
                results += self.void(other, SaveFailed(what, next="call save on every rank at the same steps"))
        return results

    def _lost(self, save: SaveId, local: int) -> SaveFailed:
        return SaveFailed(
            f"rank {self._ranks[local]} {self._gone[local]} before it sealed step {save.step}",
            where=f"local rank {local}",
            next="the step before is still there; start the run again",
        )

    def _end(self, save: SaveId, error: ResilientError) -> None:
        self._ended[save] = error
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]


def _disagree(save: SaveId, rank: int) -> RanksDisagree:
    return RanksDisagree(
        f"rank {rank} says other things of step {save.step} than its neighbours",
        next="give the same replace, world and restored state on every rank",
    )
