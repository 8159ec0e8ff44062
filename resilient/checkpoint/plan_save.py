"""The save plan: which rank writes which boxes and hands over which values (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from resilient.checkpoint.geometry import Box, c_range
from resilient.checkpoint.items import RankState, Shard, TensorInfo
from resilient.checkpoint.plan_assign import Assignment, assign
from resilient.checkpoint.plan_gather import Holdings, gather
from resilient.errors import RanksDisagree, ValuesDiffer

ValueKey = tuple[str, int | None]
"""Name of a value, and its rank if each rank has its own."""


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """What each rank writes: every element of every tensor once, and every value once."""

    fingerprint: str  # hex; of everything that the plan depends on: equal fingerprints, equal plans
    shards: Sequence[tuple[Shard, ...]]  # by rank; built when asked for, since a rank asks for its own
    values: tuple[tuple[ValueKey, ...], ...]  # by rank
    bytes_by_rank: tuple[int, ...]


def plan_save(ranks: Sequence[RankState]) -> SavePlan:
    """Decide who writes what, from the descriptions of all ranks; the same on whichever rank it is computed.

    Boxes that several ranks hold are written once, and shared out so that the bytes are level within 5%: mostly whole
    boxes, at most one cut per holder in each set of equal holders. A tensor without elements is the empty shard
    of its lowest holder, so that it is known to exist. A value that all ranks share comes from the lowest rank.

    Raises RanksDisagree unless the ranks are 0..n-1; ShardsDisagree when they describe a tensor differently or leave
    elements without a holder.
    """
    ranks = sorted(ranks, key=lambda state: state.rank)
    if [state.rank for state in ranks] != list(range(len(ranks))):
        raise RanksDisagree(
            f"a plan needs ranks 0 to {len(ranks) - 1} once each, not {[state.rank for state in ranks][:16]}",
            next="describe the state once on every rank",
        )
    holdings = gather(ranks)
    items = _Items.of(holdings)
    assignment = assign(items.nbytes, items.sets, holdings.sets, len(ranks), items.grain)
    values = _values(ranks)
    return SavePlan(
        fingerprint=xxhash.xxh3_128(repr((holdings.digest, [s.node for s in ranks], values)).encode()).hexdigest(),
        shards=_Shards(items, assignment, len(ranks)),
        values=values,
        bytes_by_rank=tuple(assignment.loads.tolist()),
    )


def fingerprint(state: RankState) -> str:
    """Hex digest of what planning depends on in one rank's state: not the values' digests, which change every step.

    While it stays the same on every rank, so does the plan.
    """
    shards = [(s.tensor.name, s.tensor.dtype, s.tensor.shape, s.box.start, s.box.shape) for s in state.shards]
    values = [(value.name, value.rank) for value in state.values]
    return xxhash.xxh3_128(repr((state.rank, state.node, shards, values)).encode()).hexdigest()


def check_values(ranks: Sequence[RankState]) -> None:
    """Raise ValuesDiffer, naming path and ranks, unless each shared value is equal on all ranks that have it."""
    shared: dict[str, dict[str, list[int]]] = {}
    own: dict[str, int] = {}
    for state in ranks:
        for value in state.values:
            if value.rank is None:
                shared.setdefault(value.name, {}).setdefault(value.digest, []).append(state.rank)
            else:
                own.setdefault(value.name, state.rank)
    for name, holders in shared.items():
        first, *others = holders.values()
        if others:
            raise ValuesDiffer(
                f"{name!r} is not the same on all ranks: rank {first[0]} and rank {others[0][0]} have different values "
                f"({len(holders)} different values on {sum(map(len, holders.values()))} ranks)",
                where=name,
                next="make it equal before saving, or mark it with resilient.PerRank(...)",
            )
        if name in own:
            raise ValuesDiffer(
                f"{name!r} is marked PerRank on rank {own[name]} and shared on rank {first[0]}",
                where=name,
                next="mark it with resilient.PerRank(...) on every rank or on none",
            )


def _values(ranks: Sequence[RankState]) -> tuple[tuple[ValueKey, ...], ...]:
    taken: set[str] = set()
    values: list[tuple[ValueKey, ...]] = []
    for state in ranks:
        mine = [(v.name, v.rank) for v in state.values if v.rank is not None or v.name not in taken]
        taken.update(name for name, rank in mine if rank is None)
        values.append(tuple(sorted(set(mine), key=lambda key: (key[0], -1 if key[1] is None else key[1]))))
    return tuple(values)


@dataclass(frozen=True, kw_only=True)
class _Items:
    """All boxes of all tensors as columns, in order of tensors' names and boxes' starts."""

    holdings: Holdings
    tensor: NDArray[np.int64]  # per item: index of its tensor
    box: NDArray[np.int64]  # per item: index among the boxes of its tensor's layout
    sets: NDArray[np.int64]  # per item: its set of holders
    nbytes: NDArray[np.int64]

    @staticmethod
    def of(holdings: Holdings) -> _Items:
        layouts = [holdings.layouts[i] for i in holdings.layout_of]
        none = np.empty(0, np.int64)
        return _Items(
            holdings=holdings,
            tensor=np.repeat(np.arange(len(layouts)), [len(layout.boxes) for layout in layouts]),
            box=np.concatenate([none, *(np.arange(len(layout.boxes)) for layout in layouts)]),
            sets=np.concatenate([none, *(layout.sets for layout in layouts)]),
            nbytes=np.concatenate(
                [none, *(lay.elements * t.item_bytes for lay, t in zip(layouts, holdings.tensors, strict=True))]
            ),
        )

    def __getitem__(self, item: int) -> tuple[TensorInfo, Box]:
        tensor = int(self.tensor[item])
        return self.holdings.tensors[tensor], self.holdings.layouts[self.holdings.layout_of[tensor]].boxes[
            int(self.box[item])
        ]

    def grain(self, item: int, limit: int) -> int:
        """Bytes of the largest line of the item's box that is within `limit`: cuts between lines make few boxes."""
        info, box = self[item]
        lines = (math.prod(box.shape[dim:]) * info.item_bytes for dim in range(1, len(box.shape) + 1))
        return next((line for line in lines if line <= limit), info.item_bytes)


class _Shards(Sequence[tuple[Shard, ...]]):
    """The shards by rank, in order of tensors and boxes."""

    def __init__(self, items: _Items, assignment: Assignment, world_size: int) -> None:
        self._items = items
        self._order = np.argsort(assignment.rank, kind="stable")
        self._edges = np.searchsorted(assignment.rank[self._order], np.arange(world_size + 1))
        self._extra: dict[int, list[Shard]] = {}
        for cut in assignment.cuts:
            info, box = items[cut.item]
            pieces = c_range(box, cut.low // info.item_bytes, cut.high // info.item_bytes)
            self._extra.setdefault(cut.rank, []).extend(Shard(tensor=info, box=piece) for piece in pieces)
        holdings = items.holdings
        for info, index in zip(holdings.tensors, holdings.layout_of, strict=True):
            layout = holdings.layouts[index]
            if not layout.boxes:
                rank, box = layout.lowest
                self._extra.setdefault(rank, []).append(Shard(tensor=info, box=box))

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, rank: int) -> tuple[Shard, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> Sequence[tuple[Shard, ...]]: ...
    def __getitem__(self, rank: int | slice) -> tuple[Shard, ...] | Sequence[tuple[Shard, ...]]:
        if isinstance(rank, slice):
            return [self[r] for r in range(len(self))[rank]]
        rank = range(len(self))[rank]
        mine = [self._items[i] for i in self._order[self._edges[rank] : self._edges[rank + 1]].tolist()]
        shards = [Shard(tensor=info, box=box) for info, box in mine]
        return tuple(sorted(shards + self._extra.get(rank, []), key=lambda s: (s.tensor.name, s.box)))

    def __iter__(self) -> Iterator[tuple[Shard, ...]]:
        return (self[rank] for rank in range(len(self)))
