"""The load plan: which stored chunks a rank reads, in which ranges, and where their elements go (pure)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from resilient.checkpoint.geometry import Box, missing
from resilient.checkpoint.items import Shard, TensorInfo
from resilient.checkpoint.stored import ChunkRecord, StoredTensor
from resilient.errors import CheckpointDamaged, StateMismatch

MAX_GAP_BYTES = 256 << 10
"""Bytes read for nothing rather than pay for one more request: about what a request's latency costs."""

MAX_READ_BYTES = 32 << 20
"""A longer read is not faster, and holds that much memory until its chunks are verified."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """Elements that one chunk gives to one wanted shard."""

    wanted: int  # index into the wanted shards
    src: Box  # relative to the chunk's box
    dst: Box  # relative to the wanted shard's box, same shape


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkUse:
    """A chunk that must be read, verified and decoded, and all its copies."""

    tensor: TensorInfo
    chunk: ChunkRecord
    copies: tuple[Copy, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRead:
    """One ranged read of one part; its chunks lie inside it, by offset. `nbytes` 0: there is nothing to fetch."""

    writer: str
    part: int
    offset: int  # bytes from the start of the part
    nbytes: int
    uses: tuple[ChunkUse, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """Every wanted element exactly once, from one chunk each."""

    wanted: tuple[Shard, ...]
    reads: tuple[PartRead, ...]  # by writer, part and offset

    @property
    def wanted_bytes(self) -> int:
        """Raw bytes that the wanted shards hold."""
        return sum(shard.nbytes for shard in self.wanted)

    @property
    def read_bytes(self) -> int:
        """Stored bytes that are fetched, gaps included."""
        return sum(read.nbytes for read in self.reads)


def plan_load(
    stored: Mapping[str, StoredTensor],
    wanted: Sequence[Shard],
    *,
    max_gap_bytes: int = MAX_GAP_BYTES,
    max_read_bytes: int = MAX_READ_BYTES,
) -> LoadPlan:
    """Intersect the wanted boxes with the stored chunks of the same name.

    A chunk that several wanted shards need is read once. Empty wanted boxes read nothing. Two chunks next to each
    other in a part become one read when at most `max_gap_bytes` lie between them, the read stays within
    `max_read_bytes` (a longer chunk is a read of its own), and what is read for nothing stays within what is
    needed, or within one gap.

    Raises StateMismatch if a tensor is not stored, or with another shape or dtype; CheckpointDamaged if the stored
    chunks leave wanted elements out or hold them twice.
    """
    found: dict[int, tuple[StoredTensor, ChunkRecord, list[Copy]]] = {}
    for index, shard in enumerate(wanted):
        tensor = _stored_as(stored, shard)
        for chunk, shared in _pieces(tensor, shard):
            copy = Copy(wanted=index, src=shared.relative_to(chunk.box), dst=shared.relative_to(shard.box))
            # By identity: hashing a record would cost more than planning it, and `stored` keeps it alive.
            found.setdefault(id(chunk), (tensor, chunk, []))[2].append(copy)
    uses = [ChunkUse(tensor=t.info, chunk=chunk, copies=tuple(copies)) for t, chunk, copies in found.values()]
    return LoadPlan(wanted=tuple(wanted), reads=tuple(_coalesce(uses, max_gap_bytes, max_read_bytes)))


def _stored_as(stored: Mapping[str, StoredTensor], shard: Shard) -> StoredTensor:
    live = shard.tensor
    tensor = stored.get(live.name)
    if tensor is None:
        raise StateMismatch(
            f"the checkpoint holds no tensor {live.name!r} ({live.dtype}, shape {live.shape})",
            where=live.name,
            next="`resilient inspect` lists what it holds; strict=False leaves missing tensors as they are",
        )
    if tensor.info.shape != live.shape:
        raise StateMismatch(
            f"{live.name!r} is stored with shape {tensor.info.shape}, the live tensor has {live.shape}",
            where=live.name,
            next="build the model with the sizes it was saved with, or restore less with only=",
        )
    if tensor.info.dtype != live.dtype:
        raise StateMismatch(
            f"{live.name!r} is stored as {tensor.info.dtype}, the live tensor is {live.dtype}; "
            f"nothing is converted on the way",
            where=live.name,
            next=f"create it as {tensor.info.dtype}, or restore less with only= and convert yourself",
        )
    return tensor


def _pieces(tensor: StoredTensor, shard: Shard) -> list[tuple[ChunkRecord, Box]]:
    """The chunks that hold the shard's elements, with what they share: a partition of its box, or CheckpointDamaged."""
    box = shard.box
    if box.size == 0:
        return []
    pieces = [(chunk, shared) for chunk in tensor.near(box) if (shared := chunk.box.overlap(box)) is not None]
    shared_boxes = [shared for _, shared in pieces]
    held = sum(map(_size, shared_boxes))
    if held == box.size and _in_a_row(shared_boxes):
        return pieces
    gaps = missing(shared_boxes, box)
    if gaps:
        raise CheckpointDamaged(
            f"no chunk holds {gaps[0]} of {tensor.info.name!r} (shape {tensor.info.shape}); "
            f"{sum(map(_size, gaps))} of the {box.size} elements wanted are missing",
            where=tensor.info.name,
            next="`resilient verify` names the object; restore an older step",
        )
    if held != box.size:
        raise CheckpointDamaged(
            f"the chunks of {tensor.info.name!r} overlap: {held} elements are stored for the {box.size} in {box}",
            where=tensor.info.name,
            next="`resilient verify` names the object; restore an older step",
        )
    return pieces


def _size(box: Box) -> int:
    return math.prod(box.shape)


def _in_a_row(boxes: Sequence[Box]) -> bool:
    """Whether the boxes, in order, are slices of one box along dim 0: then equal sizes prove a partition.

    This is what a writer's own chunks look like to a reader in the same layout; anything else is proved by `missing`.
    """
    return all(
        a.shape[1:] == b.shape[1:] and a.start[1:] == b.start[1:] and a.start[0] + a.shape[0] == b.start[0]
        for a, b in itertools.pairwise(boxes)
    )


def _coalesce(uses: Iterable[ChunkUse], max_gap_bytes: int, max_read_bytes: int) -> Iterable[PartRead]:
    place = attrgetter("chunk.writer", "chunk.part", "chunk.offset", "chunk.stored_bytes")
    ordered = sorted(uses, key=place)
    for (writer, part), group in itertools.groupby(ordered, key=attrgetter("chunk.writer", "chunk.part")):
        members: list[ChunkUse] = []
        start = stop = useful = 0
        for use in group:
            low, high = use.chunk.offset, use.chunk.offset + use.chunk.stored_bytes
            gain = max(0, high - max(low, stop))
            over = max(high, stop) - start - useful - gain
            if members and (
                low - stop > max_gap_bytes
                or max(high, stop) - start > max_read_bytes
                or over > max(max_gap_bytes, useful + gain)
            ):
                yield PartRead(writer=writer, part=part, offset=start, nbytes=stop - start, uses=tuple(members))
                members = []
            if not members:
                start, stop, useful, gain = low, low, 0, high - low
            members.append(use)
            stop, useful = max(stop, high), useful + gain
        if members:
            yield PartRead(writer=writer, part=part, offset=start, nbytes=stop - start, uses=tuple(members))
