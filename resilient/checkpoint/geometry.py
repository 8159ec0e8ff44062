"""Boxes: where a shard lies in its global tensor, and what boxes share, lack and are cut into (pure)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resilient.errors import ShardInvalid


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open N-d interval in global elements; a scalar's box has no dims and size 1."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.shape):
            raise ShardInvalid(f"a box has one start and one length per dim, not {self.start} and {self.shape}")
        if min(self.start, default=0) < 0 or min(self.shape, default=0) < 0:
            raise ShardInvalid(f"a box has no negative start or length: {self.start}, {self.shape}")

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape, strict=True)) + "]"

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """The first element past the box, per dim."""
        return tuple(start + length for start, length in zip(self.start, self.shape, strict=True))

    def inside(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies in a tensor of this global shape."""
        return len(shape) == len(self.shape) and all(
            start + length <= n for start, length, n in zip(self.start, self.shape, shape, strict=True)
        )

    def overlap(self, other: Box) -> Box | None:
        """The elements in both boxes; None if there are none (boxes that only touch, or an empty one).

        Raises ShardInvalid if the boxes have different numbers of dims.
        """
        if len(self.start) != len(other.start):
            raise ShardInvalid(f"{self} and {other} are boxes of tensors with different numbers of dims")
        starts, lengths = [], []
        for a, n, b, m in zip(self.start, self.shape, other.start, other.shape, strict=True):
            start = max(a, b)
            length = min(a + n, b + m) - start
            if length <= 0:
                return None
            starts.append(start)
            lengths.append(length)
        return Box(tuple(starts), tuple(lengths))

    def relative_to(self, outer: Box) -> Box:
        """The same elements, counted from the first element of `outer`. Raises ShardInvalid unless inside it."""
        if len(self.start) != len(outer.start) or not all(
            b <= a and a + n <= b + m
            for a, n, b, m in zip(self.start, self.shape, outer.start, outer.shape, strict=True)
        ):
            raise ShardInvalid(f"{self} is not inside {outer}")
        return Box(tuple(a - b for a, b in zip(self.start, outer.start, strict=True)), self.shape)

    def slices(self) -> tuple[slice, ...]:
        """An index for an array of the box's tensor, or of the box that this one is relative to; () for a scalar."""
        return tuple(slice(start, start + length) for start, length in zip(self.start, self.shape, strict=True))


def whole(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), shape)


def split(box: Box, max_elements: int) -> tuple[Box, ...]:
    """Cut a box into boxes of at most `max_elements` elements, which follow one another in its C order.

    So piece k starts, in the box's own bytes, where piece k-1 ends. Pieces of one row of cuts differ by at most
    one line. An empty box gives no pieces, a scalar one. Raises ShardInvalid if `max_elements` is not positive.
    """
    if max_elements < 1:
        raise ShardInvalid(f"a piece has at least one element, not {max_elements}")
    if box.size == 0:
        return ()
    if box.size <= max_elements:
        return (box,)
    dim = next(d for d in range(len(box.shape)) if math.prod(box.shape[d + 1 :]) <= max_elements)
    lines = box.shape[dim]
    cuts = -(-lines // (max_elements // math.prod(box.shape[dim + 1 :])))
    edges = [lines * i // cuts for i in range(cuts + 1)]
    pieces = []
    outer = box.shape[:dim]
    for n in range(math.prod(outer)):
        at = tuple(a + i for a, i in zip(box.start, _unravel(n, outer), strict=False))
        for low, high in itertools.pairwise(edges):
            start = (*at, box.start[dim] + low, *box.start[dim + 1 :])
            pieces.append(Box(start, (1,) * dim + (high - low, *box.shape[dim + 1 :])))
    return tuple(pieces)


def c_range(box: Box, low: int, high: int) -> tuple[Box, ...]:
    """The elements low..high (half open, counted in the box's C order) as boxes in that order: at most 2 * dims - 1.

    Raises ShardInvalid if the range is not inside the box.
    """
    if not 0 <= low <= high <= box.size:
        raise ShardInvalid(f"elements {low}:{high} are not inside {box} of {box.size}")
    if low == high:
        return ()
    if high - low == box.size:
        return (box,)
    line = math.prod(box.shape[1:])
    first, last = low // line, (high - 1) // line
    if first == last:
        return _in_line(box, first, low - first * line, high - first * line)
    pieces: list[Box] = []
    if low % line:
        pieces += _in_line(box, first, low % line, line)
        first += 1
    stop = high // line  # of the whole lines
    if first < stop:
        pieces.append(Box((box.start[0] + first, *box.start[1:]), (stop - first, *box.shape[1:])))
    if high % line:
        pieces += _in_line(box, last, 0, high % line)
    return tuple(pieces)


def missing(boxes: Iterable[Box], of: Box) -> tuple[Box, ...]:
    """The elements of `of` that are in none of `boxes`, as disjoint boxes in order of their start; () if none.

    Cuts space at the boxes' own faces, at the median one first: about n log n for boxes that form a partition.
    """
    clipped = [(b.start, b.stop) for b in (box.overlap(of) for box in boxes) if b is not None]
    gaps = []
    todo = [(of.start, of.stop, clipped)] if of.size else []
    while todo:
        start, stop, inside = todo.pop()
        if not inside:
            gaps.append(Box(start, tuple(b - a for a, b in zip(start, stop, strict=True))))
            continue
        if (start, stop) in inside:
            continue
        dim, at = _median_face(start, stop, inside)
        below = [(a, _with(b, dim, min(b[dim], at))) for a, b in inside if a[dim] < at]
        above = [(_with(a, dim, max(a[dim], at)), b) for a, b in inside if b[dim] > at]
        todo.append((start, _with(stop, dim, at), below))
        todo.append((_with(start, dim, at), stop, above))
    return tuple(sorted(gaps))


def covers(boxes: Iterable[Box], shape: tuple[int, ...]) -> bool:
    """Whether every element of a tensor of this shape is in at least one of the boxes."""
    return not missing(boxes, whole(shape))


def _unravel(n: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for length in reversed(shape):
        n, i = divmod(n, length)
        index.append(i)
    return tuple(reversed(index))


def _in_line(box: Box, i: int, low: int, high: int) -> tuple[Box, ...]:
    """c_range within line i of the box's first dim."""
    if len(box.shape) == 1:
        return (Box((box.start[0] + i + low,), (high - low,)),)
    parts = c_range(Box(box.start[1:], box.shape[1:]), low, high)
    return tuple(Box((box.start[0] + i, *part.start), (1, *part.shape)) for part in parts)


def _with(point: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*point[:dim], value, *point[dim + 1 :])


def _median_face(
    start: tuple[int, ...], stop: tuple[int, ...], inside: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[int, int]:
    """(dim, coordinate) of a cut strictly between start and stop: the dim with the most faces, their median."""
    best: list[int] = []
    best_dim = -1
    for dim in range(len(start)):
        faces = {a[dim] for a, _ in inside} | {b[dim] for _, b in inside}
        faces -= {start[dim], stop[dim]}
        if len(faces) > len(best):
            best, best_dim = sorted(faces), dim
    return best_dim, best[len(best) // 2]
