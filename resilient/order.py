"""The order of samples: a shuffle that is a pure function of (seed, epoch, index), at any size (no torch)."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]

TABLE_SIZE_MAX = 1 << 16
"""Up to this many samples an epoch is shuffled by sorting keys; beyond, by a permutation without any table."""
_ROUNDS = 8
_GOLDEN, _M1, _M2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def ordered(positions: npt.NDArray[np.int64], size: int, seed: int, *, shuffle: bool = True) -> list[int]:
    """Dataset indices of the samples at `positions` of the endless sequence; epoch = position // size.

    Each index comes exactly once per epoch. `positions` is 1-d, not negative.
    """
    epochs, indices = np.divmod(positions, size)
    if not shuffle:
        return [int(index) for index in indices]
    out = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = permuted(indices[chosen].astype(np.uint64), size, _key(seed, int(epoch))).astype(np.int64)
    return [int(index) for index in out]


def permuted(indices: Numbers, size: int, key: int) -> Numbers:
    """Images of `indices` (below `size`) under the permutation of 0 .. size - 1 that `key` (64 bits) names."""
    if size <= TABLE_SIZE_MAX:
        return _table(size, key)[indices]
    # A Feistel network on an even number of bits, walked until it lands inside: at most four rounds on average.
    half = np.uint64((int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    out = _feistel(indices, half, mask, key)
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], half, mask, key)
    return out


def number(seed: int, position: int, purpose: str) -> int:
    """64 bits drawn for one sample of the sequence and one purpose."""
    return _bits(f"{purpose}/{seed}/{position}")


def _feistel(numbers: Numbers, half: np.uint64, mask: np.uint64, key: int) -> Numbers:
    left, right = numbers >> half, numbers & mask
    for round_key in _round_keys(key):
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << half) | right


@functools.lru_cache(maxsize=8)
def _round_keys(key: int) -> Numbers:
    return _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN + np.array([key], dtype=np.uint64))


@functools.lru_cache(maxsize=8)
def _table(size: int, key: int) -> Numbers:
    drawn = _mix(np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN + np.array([key], dtype=np.uint64))
    return np.argsort(drawn, kind="stable").astype(np.uint64)


def _mix(z: Numbers) -> Numbers:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every output bit depends on every input bit."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    mixed: Any = z ^ (z >> np.uint64(31))
    return mixed  # type: ignore[no-any-return]


def _key(seed: int, epoch: int) -> int:
    return _bits(f"epoch/{seed}/{epoch}")


def _bits(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
