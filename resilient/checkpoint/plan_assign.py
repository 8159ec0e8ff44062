"""Sharing out bytes between those who hold them, level and with few cuts (pure, numbers only)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

TOLERANCE = 0.02
"""A boundary moves by up to this part of a share rather than cut an item, so loads stay level within 5%."""

MIN_CUT_BYTES = 64 << 10
"""No cut leaves a smaller piece: that would cost more in requests and index than it levels."""


MAX_ROUNDS = 30
"""Of levelling sets that cross; sets that do not cross are level after one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A part of an item that was divided between its holders."""

    item: int
    low: int  # bytes from the start of the item
    high: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who writes each item; -1 where the item is divided, see `cuts`."""

    rank: Ints
    cuts: tuple[Cut, ...]
    loads: Ints  # bytes by rank


def assign(
    nbytes: Ints, set_of: Ints, sets: Sequence[tuple[int, ...]], world_size: int, grain: Callable[[int, int], int]
) -> Assignment:
    """Give each item (of nbytes > 0) to one of the ranks in its set, dividing the few that would tip the balance.

    The items of a set are laid end to end and the holders' shares marked off along them, so that there is at most
    one cut per holder. `grain(item, limit)` says in which multiples of bytes an item may be cut, close to but within
    `limit` if it can.
    """
    rank = np.full(len(nbytes), -1, np.int64)
    cuts: list[Cut] = []
    order = np.argsort(set_of, kind="stable")
    edges = np.searchsorted(set_of[order], np.arange(len(sets) + 1))
    groups = [
        (np.asarray(sets[i], np.int64), order[edges[i] : edges[i + 1]])
        for i in sorted(range(len(sets)), key=lambda i: (len(sets[i]), sets[i]))
    ]
    shares = _share_out([members for members, _ in groups], [int(nbytes[at].sum()) for _, at in groups], world_size)
    loads = np.zeros(world_size, np.int64)
    for (members, _), share in zip(groups, shares, strict=True):
        loads[members] += share
    for (members, items), share in zip(groups, shares, strict=True):
        if len(members) == 1:
            rank[items] = members[0]
        elif len(items):
            # Boundaries moved to edges: those who come later make up for it.
            loads[members] -= share
            stops = np.cumsum(nbytes[items])
            starts = stops - nbytes[items]
            bounds = _bounds(level(loads[members], int(stops[-1])), starts, stops, _of(grain, items))
            loads[members] += np.diff(bounds)
            first = np.searchsorted(bounds, starts, "right") - 1
            last = np.searchsorted(bounds, stops, "left") - 1
            uncut = first == last
            rank[items[uncut]] = members[first[uncut]]
            for i in np.flatnonzero(~uncut).tolist():
                for k in range(int(first[i]), int(last[i]) + 1):
                    at = int(starts[i])
                    low, high = max(at, int(bounds[k])), min(int(stops[i]), int(bounds[k + 1]))
                    if low < high:
                        cuts.append(Cut(item=int(items[i]), low=low - at, high=high - at, rank=int(members[k])))
    return Assignment(rank=rank, cuts=tuple(cuts), loads=loads)


def _of(grain: Callable[[int, int], int], items: Ints) -> Callable[[int, int], int]:
    return lambda i, limit: grain(int(items[i]), limit)


def _share_out(sets: Sequence[Ints], totals: Sequence[int], world_size: int) -> list[Ints]:
    """How many bytes of each set each of its members should take, so that all loads together are as level as can be.

    Sets cross (one tensor is replicated over one axis of the mesh, another over another), so no single order of
    filling them is right: each set is filled again, given all others, until little moves. That descends to the
    least sum of squared loads, set by set.
    """
    loads = np.zeros(world_size, np.int64)
    shares: list[Ints] = [np.zeros(len(members), np.int64) for members in sets]
    enough = TOLERANCE / 10 * sum(totals) / max(1, world_size)
    for _ in range(MAX_ROUNDS):
        moved = 0
        for index, (members, total) in enumerate(zip(sets, totals, strict=True)):
            if len(members) == 1 and shares[index][0] == total:
                continue
            loads[members] -= shares[index]
            share = level(loads[members], total)
            loads[members] += share
            moved = max(moved, int(np.abs(share - shares[index]).max()))
            shares[index] = share
        if moved <= enough:
            break
    return shares


def level(loads: Ints, total: int) -> Ints:
    """How much of `total` each gets so that the least loaded are filled up to one common level; sums to `total`."""
    order = np.argsort(loads, kind="stable")
    rising = loads[order].astype(np.float64)
    levels = (total + np.cumsum(rising)) / np.arange(1, len(loads) + 1)
    filled = int(np.flatnonzero(levels >= rising)[-1])
    shares = np.maximum(0.0, levels[filled] - loads)
    # Rounding the running sum, not the shares, keeps the total.
    ends = np.rint(np.cumsum(shares)).astype(np.int64)
    ends[-1] = total
    shared: Ints = np.diff(np.minimum(ends, total), prepend=0)
    return shared


def _bounds(shares: Ints, starts: Ints, stops: Ints, grain: Callable[[int, int], int]) -> Ints:
    """Where each holder's share begins and ends along the items: on an edge if one is near, else inside an item."""
    total = int(stops[-1])
    limit = max(int(total / len(shares) * TOLERANCE), MIN_CUT_BYTES)
    marks = np.cumsum(shares)[:-1]
    edges = np.concatenate([starts, stops[-1:]])
    after = np.clip(np.searchsorted(edges, marks), 1, len(edges) - 1)
    below, above = edges[after - 1], edges[after]
    nearest = np.where(marks - below <= above - marks, below, above)
    inside = np.abs(marks - nearest) > limit
    bounds = np.where(inside, marks, nearest)
    for k in np.flatnonzero(inside).tolist():
        i = int(after[k]) - 1
        step = grain(i, limit)
        bounds[k] = min(int(starts[i]) + round((int(marks[k]) - int(starts[i])) / step) * step, int(stops[i]))
    return np.concatenate([[0], bounds, [total]]).astype(np.int64)
