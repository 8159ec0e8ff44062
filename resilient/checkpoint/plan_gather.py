"""Who holds what: the shards of all ranks, brought into one partition per distinct layout (pure)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from resilient.checkpoint.geometry import Box, missing, whole
from resilient.checkpoint.items import RankState, TensorInfo
from resilient.errors import ShardsDisagree

Ints = NDArray[np.int64]
_REMEMBERED = 1_000_000  # objects known by identity, beyond which the memory is worth more than the time


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one or many tensors of equal shape lie on the ranks: disjoint boxes that cover them, in order of start."""

    boxes: tuple[Box, ...]  # none for tensors without elements
    sets: Ints  # per box: index into Holdings.sets
    elements: Ints  # per box
    lowest: tuple[int, Box]  # lowest rank that describes it, and a box of that rank: who speaks for an empty tensor


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """All tensors in order of their names; tensors that lie on the ranks in the same way share a Layout."""

    tensors: tuple[TensorInfo, ...]
    layout_of: tuple[int, ...]  # per tensor: index into layouts
    layouts: tuple[Layout, ...]
    sets: tuple[tuple[int, ...], ...]  # sets of holders: ranks, ascending
    digest: str  # hex xxh3_128 of all of the above


def gather(ranks: Sequence[RankState]) -> Holdings:
    """Bring the ranks' shards together.

    Costs a fraction of a microsecond per shard, in Python; everything after that is done once per distinct layout.
    Boxes that overlap in part are cut.

    Raises ShardsDisagree when ranks describe a tensor differently, or when elements have no holder.
    """
    seen = _Seen()
    columns = [seen.rows(state) for state in ranks]
    tensor = np.concatenate([t for t, _ in columns]) if columns else np.empty(0, np.int64)
    box = np.concatenate([b for _, b in columns]) if columns else np.empty(0, np.int64)
    rank = np.repeat(np.asarray([s.rank for s in ranks], np.int64), [len(t) for t, _ in columns])
    # Ranks ascend already, and a stable sort keeps them so within each (tensor, box).
    order = np.argsort(tensor * max(1, len(seen.boxes)) + box, kind="stable")
    tensor, box, rank = tensor[order], box[order], rank[order]
    edges = np.searchsorted(tensor, np.arange(len(seen.infos) + 1))
    layouts: list[Layout] = []
    known: dict[tuple[tuple[int, ...], bytes, bytes], int] = {}
    sets: dict[bytes, int] = {}
    layout_of = []
    for index, info in enumerate(seen.infos):
        here = slice(edges[index], edges[index + 1])
        key = (info.shape, box[here].tobytes(), rank[here].tobytes())
        if key not in known:
            known[key] = len(layouts)
            layouts.append(_layout(info, [seen.boxes[i] for i in box[here].tolist()], box[here], rank[here], sets))
        layout_of.append(known[key])
    by_name = sorted(range(len(seen.infos)), key=lambda i: seen.infos[i].name)
    tensors = tuple(seen.infos[i] for i in by_name)
    member_sets = tuple(tuple(np.frombuffer(members, np.int64).tolist()) for members in sets)
    places = tuple(layout_of[i] for i in by_name)
    digest = xxhash.xxh3_128(repr(([(t.name, t.dtype, t.shape) for t in tensors], places, member_sets)).encode())
    for layout in layouts:
        digest.update(repr(([(b.start, b.shape) for b in layout.boxes], layout.lowest)).encode())
        digest.update(layout.sets.tobytes())
    return Holdings(
        tensors=tensors, layout_of=places, layouts=tuple(layouts), sets=member_sets, digest=digest.hexdigest()
    )


@dataclass
class _Seen:
    """Numbers for the tensors and boxes that occur, in order of appearance; equal ones get the same number."""

    infos: list[TensorInfo] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    tensor_of: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> number, first rank
    box_of: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)
    # By identity, because ranks that were described together share objects; `ranks` keeps them alive.
    tensor_by_id: dict[int, int] = field(default_factory=dict)
    box_by_id: dict[int, int] = field(default_factory=dict)

    def rows(self, state: RankState) -> tuple[Ints, Ints]:
        """The rank's shards as numbers of tensors and numbers of boxes."""
        tensors = [self.tensor_by_id.get(id(shard.tensor), -1) for shard in state.shards]
        if -1 in tensors:
            tensors = [self._tensor(shard.tensor, state.rank) for shard in state.shards]
        boxes = [self.box_by_id.get(id(shard.box), -1) for shard in state.shards]
        if -1 in boxes:
            boxes = [self._box(shard.box) for shard in state.shards]
        return np.asarray(tensors, np.int64), np.asarray(boxes, np.int64)

    def _tensor(self, info: TensorInfo, rank: int) -> int:
        number, first = self.tensor_of.setdefault(info.name, (len(self.infos), rank))
        if number == len(self.infos):
            self.infos.append(info)
        elif (other := self.infos[number]) is not info and other != info:
            raise ShardsDisagree(
                f"rank {first} has {info.name!r} as {other.dtype} of shape {other.shape}, "
                f"rank {rank} as {info.dtype} of shape {info.shape}",
                where=info.name,
                next="build the model with the same sizes and dtypes on every rank",
            )
        if len(self.tensor_by_id) < _REMEMBERED:
            self.tensor_by_id[id(info)] = number
        return number

    def _box(self, box: Box) -> int:
        number = self.box_of.setdefault((box.start, box.shape), len(self.boxes))
        if number == len(self.boxes):
            self.boxes.append(box)
        if len(self.box_by_id) < _REMEMBERED:
            self.box_by_id[id(box)] = number
        return number


def _layout(info: TensorInfo, held: Sequence[Box], box: Ints, rank: Ints, sets: dict[bytes, int]) -> Layout:
    """The layout of a tensor from its (box, rank) pairs, which are sorted by box number, then rank."""
    cuts = [0, *(np.flatnonzero(np.diff(box)) + 1).tolist(), len(box)]
    holders = {
        held[low]: np.unique(rank[low:high]) for low, high in itertools.pairwise(cuts) if low < high and held[low].size
    }
    parts = sorted(holders)
    if not _is_grid(parts, info.shape):
        holders = _cut(holders)
        parts = sorted(holders)
        gaps = missing(parts, whole(info.shape))
        if gaps:
            raise ShardsDisagree(
                f"no rank holds {gaps[0]} of {info.name!r} (shape {info.shape}); "
                f"ranks {_few(np.unique(rank).tolist())} hold parts of it",
                where=info.name,
                next="save from every rank that holds a part of the model, each with its own part",
            )
    numbers = [sets.setdefault(holders[part].astype(np.int64).tobytes(), len(sets)) for part in parts]
    return Layout(
        boxes=tuple(parts),
        sets=np.asarray(numbers, np.int64),
        elements=np.asarray([part.size for part in parts], np.int64),
        lowest=(int(rank.min()), held[int(rank.argmin())]),
    )


def _is_grid(parts: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether distinct boxes are exactly the cells of a grid over the shape: a quick proof for what meshes produce."""
    cells = 1
    for dim, length in enumerate(shape):
        intervals = sorted({(part.start[dim], part.shape[dim]) for part in parts})
        cells *= len(intervals)
        at = 0
        for start, n in intervals:
            if start != at:
                return False
            at += n
        if at != length:
            return False
    return cells == len(parts) and math.prod(shape) > 0


def _cut(holders: Mapping[Box, Ints]) -> dict[Box, Ints]:
    """Disjoint boxes with the same union, each with all ranks that hold it; smaller boxes stay whole.

    Quadratic in the number of distinct boxes, where some overlap in part; those that do not come back as they are.
    """
    if sum(box.size for box in holders) == _union_size(list(holders)):
        return dict(holders)
    parts: list[Box] = []
    for box in sorted(holders, key=lambda b: (b.size, b)):
        parts += missing(parts, box)
    return {
        part: np.unique(np.concatenate([who for box, who in holders.items() if box.overlap(part) == part]))
        for part in parts
    }


def _union_size(parts: Sequence[Box]) -> int:
    if not parts:
        return 0
    stop = tuple(max(part.stop[dim] for part in parts) for dim in range(len(parts[0].start)))
    return math.prod(stop) - sum(gap.size for gap in missing(parts, whole(stop)))


def _few(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
