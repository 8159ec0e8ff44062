"""What an index says of a stored tensor: its chunks, where they lie, what they must hash to (pure)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import TensorInfo
from resilient.errors import CheckpointDamaged

HASH_BYTES = 16  # xxh3_128


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRecord:
    """The unit that is encoded, hashed and read: one box of a tensor, in one byte range of one part."""

    box: Box  # in the global tensor; its raw bytes are in the box's C order
    writer: str  # whose index this is, e.g. "n00003"
    part: int  # number of the part among that writer's parts
    offset: int  # bytes from the start of the part
    stored_bytes: int  # encoded length
    raw_bytes: int  # decoded length: box.size * item_bytes
    codec: str  # codec id of this chunk
    raw_hash: bytes  # xxh3_128 of the raw bytes, 16 bytes, taken from the snapshot before encoding
    stored_hash: bytes  # xxh3_128 of the stored bytes, 16 bytes

    def __post_init__(self) -> None:
        if min(self.part, self.offset, self.stored_bytes, self.raw_bytes) < 0:
            raise CheckpointDamaged(
                f"a chunk record holds a negative number: part {self.part}, offset {self.offset}, "
                f"{self.stored_bytes} stored and {self.raw_bytes} raw bytes",
                where=f"{self.writer} {self.box}",
            )
        if len(self.raw_hash) != HASH_BYTES or len(self.stored_hash) != HASH_BYTES:
            raise CheckpointDamaged(
                f"a chunk's hashes have {HASH_BYTES} bytes, not {len(self.raw_hash)} and {len(self.stored_hash)}",
                where=f"{self.writer} {self.box}",
            )


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint: its description, and all its chunks in order of their boxes (sorted here).

    A tensor without elements has no chunks. Raises CheckpointDamaged if a chunk does not lie in the tensor or its
    raw length is not that of its box. Whether the chunks cover the tensor is asked when it is read (`plan_load`).
    """

    info: TensorInfo
    chunks: tuple[ChunkRecord, ...]
    longest: int = field(init=False, repr=False, compare=False)  # length of the longest chunk along dim 0, elements

    def __post_init__(self) -> None:
        item, shape, longest = self.info.item_bytes, self.info.shape, 0
        for chunk in self.chunks:
            box = chunk.box
            if not box.inside(shape) or chunk.raw_bytes != box.size * item:
                raise CheckpointDamaged(
                    f"chunk {box} with {chunk.raw_bytes} raw bytes is not a part of a {self.info.dtype} tensor "
                    f"of shape {shape}",
                    where=f"{self.info.name} in {chunk.writer}",
                )
            if shape:
                longest = max(longest, box.shape[0])
        object.__setattr__(self, "chunks", tuple(sorted(self.chunks, key=_start)))
        object.__setattr__(self, "longest", longest)

    def near(self, box: Box) -> tuple[ChunkRecord, ...]:
        """The chunks that can share elements with `box`, found by bisecting along dim 0; some of them may not."""
        if not self.info.shape:
            return self.chunks
        low = bisect_left(self.chunks, box.start[0] - self.longest + 1, key=_first)
        high = bisect_left(self.chunks, box.start[0] + box.shape[0], key=_first)
        return self.chunks[low:high]


def _start(chunk: ChunkRecord) -> tuple[int, ...]:
    return chunk.box.start


def _first(chunk: ChunkRecord) -> int:
    return chunk.box.start[0]
