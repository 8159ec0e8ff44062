"""The vocabulary of checkpoints: tensors, shards, values, and where a shard lies in a snapshot (no I/O, no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilient.checkpoint.geometry import Box
from resilient.errors import DtypeUnknown, ShardInvalid

ITEM_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of one element by dtype; the names are torch's, without the `torch.`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One global tensor of the state."""

    name: str  # e.g. "model/layers.0.mlp.up_proj.weight"
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]  # global, elements; () for a scalar

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise DtypeUnknown(f"dtype {self.dtype!r} of {self.name!r} is not one that checkpoints hold")
        if any(n < 0 for n in self.shape):
            raise ShardInvalid(f"{self.name!r} has a negative size: {self.shape}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A box of a global tensor, as one rank holds, writes or wants it; bytes in C order of the box."""

    tensor: TensorInfo
    box: Box

    def __post_init__(self) -> None:
        if not self.box.inside(self.tensor.shape):
            raise ShardInvalid(f"{self.box} is not inside {self.tensor.shape}", where=self.tensor.name)

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.size * self.tensor.item_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueInfo:
    """A plain value of the state; its bytes travel with the save, only its name and digest take part in planning."""

    name: str
    digest: str  # hex xxh3_128 of the encoded value
    rank: int | None = None  # None: must be equal on every rank that has it; else this rank's own (RNG, PerRank)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankState:
    """What one rank holds: the input of planning."""

    rank: int
    node: int
    shards: tuple[Shard, ...]
    values: tuple[ValueInfo, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Where a shard lies in a snapshot's buffer."""

    shard: Shard
    offset: int  # bytes from the start of the buffer
