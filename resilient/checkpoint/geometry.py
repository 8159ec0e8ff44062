"""Boxes: where a shard lies in its global tensor, and what two of them share (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resilient.errors import ShardInvalid


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open N-d interval in global elements; a scalar's box has no dims and size 1."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.shape):
            raise ShardInvalid(f"a box has one start and one length per dim, not {self.start} and {self.shape}")
        if any(n < 0 for n in self.start) or any(n < 0 for n in self.shape):
            raise ShardInvalid(f"a box has no negative start or length: {self.start}, {self.shape}")

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies in a tensor of this global shape."""
        return len(shape) == len(self.shape) and all(
            start + length <= n for start, length, n in zip(self.start, self.shape, shape, strict=True)
        )
