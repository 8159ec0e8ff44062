"""Byte planes: words rotated so that the exponent fills a byte, taken apart into bytes of equal rank (pure).

Plane k of a chunk holds byte k (0 = least significant) of every word after rotating the word left. The top plane of a
rotated IEEE word is its exponent, which trained weights repeat a lot; the others are close to noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]  # uint8, uint16, uint32 or uint64

BLOCK_WORDS = 1 << 17
"""Words worked on at a time, so that temporaries stay in the processor's cache."""

WORD_TYPES: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""NumPy's unsigned integer by bytes of a word; files are little-endian, as every machine that this runs on."""


def as_words(data: memoryview, word_bytes: int) -> Words:
    """`data` seen as words, without a copy; its length must be a multiple of `word_bytes`."""
    return np.frombuffer(data, dtype=WORD_TYPES[word_bytes])


def split(words: Words, rotate: int, room: Bytes | None = None) -> list[Bytes]:
    """The planes of `words`, least significant first, each one byte per word.

    rotate  bits to the left, 0 or 1
    room    at least the bytes of `words`, where the planes are put; else memory is allocated, which is slower than
            the split itself when the kernel has to find it page by page
    """
    width = words.dtype.itemsize
    if width == 1:
        return [words.view(np.uint8)]
    if room is None:
        room = np.empty(words.nbytes, np.uint8)
    planes = list(room[: words.nbytes].reshape(width, words.size))
    scratch = np.empty((2, min(BLOCK_WORDS, words.size)), words.dtype)
    for at in range(0, words.size, BLOCK_WORDS):
        block = words[at : at + BLOCK_WORDS]
        rotated, shifted = scratch[0, : block.size], scratch[1, : block.size]
        span = slice(at, at + block.size)
        if rotate:
            np.left_shift(block, rotate, out=rotated)
            np.right_shift(block, 8 * width - rotate, out=shifted)
            np.bitwise_or(rotated, shifted, out=rotated)
        else:
            rotated = block
        np.copyto(planes[0][span], rotated, casting="unsafe")
        for k in range(1, width):
            np.right_shift(rotated, 8 * k, out=shifted)
            np.copyto(planes[k][span], shifted, casting="unsafe")
    return planes


def merge(planes: list[Bytes | int], rotate: int, out: Words) -> None:
    """Put planes together again into `out` (writable words); an int stands for a plane of that byte throughout."""
    width = out.dtype.itemsize
    scratch = np.empty(min(BLOCK_WORDS, out.size), out.dtype)
    for at in range(0, out.size, BLOCK_WORDS):
        block = out[at : at + BLOCK_WORDS]
        span = slice(at, at + block.size)
        top = planes[-1]
        np.copyto(block, top if isinstance(top, int) else top[span])
        for k in range(width - 2, -1, -1):
            np.left_shift(block, 8, out=block)
            plane = planes[k]
            if not isinstance(plane, int):
                np.bitwise_or(block, plane[span], out=block)
            elif plane:
                np.bitwise_or(block, block.dtype.type(plane), out=block)
        if rotate:
            low = scratch[: block.size]
            np.right_shift(block, rotate, out=low)
            np.left_shift(block, 8 * width - rotate, out=block)
            np.bitwise_or(block, low, out=block)


def pack7(plane: Bytes) -> Bytes:
    """A plane whose lowest bits are all 0 (the sign of a square), 8 bytes into 7: 7 * ceil(n / 8) bytes.

    Each byte's upper 7 bits follow one another from the least significant bit of a 56-bit little-endian group.
    """
    padded = np.zeros(-(-plane.size // 8) * 8, np.uint8)
    padded[: plane.size] = plane
    x = padded.view(np.uint64)
    x >>= 1  # every byte's lowest bit is 0, so nothing crosses into its neighbour
    for bits, mask in ((7, 0x007F007F007F007F), (14, 0x00003FFF00003FFF), (28, 0x000000000FFFFFFF)):
        # Pairs of fields lie 8, 16, 32 bits apart; close the gap of 1, 2, 4 bits between them.
        low = x & np.uint64(mask)
        x >>= np.uint64(bits // 7)
        x &= np.uint64(mask << bits)
        x |= low
    return np.ascontiguousarray(padded.reshape(-1, 8)[:, :7]).reshape(-1)


def unpack7(packed: Bytes, size: int) -> Bytes:
    """The `size` bytes that `pack7` packed."""
    padded = np.zeros((packed.size // 7, 8), np.uint8)
    padded[:, :7] = packed.reshape(-1, 7)
    x = padded.reshape(-1).view(np.uint64)
    for bits, mask in ((28, 0x000000000FFFFFFF), (14, 0x00003FFF00003FFF), (7, 0x007F007F007F007F)):
        low = x & np.uint64(mask)
        x &= np.uint64(mask << bits)
        x <<= np.uint64(bits // 7)
        x |= low
    x <<= np.uint64(1)
    return padded.reshape(-1)[:size]


def sample(words: Words, runs: int = 16, run_words: int = 512) -> Words:
    """Some of the words, in runs spread evenly from the first to the last; all of them where there are few."""
    if words.size <= runs * run_words:
        return words
    step = (words.size - run_words) // (runs - 1)
    return np.concatenate([words[i * step : i * step + run_words] for i in range(runs)])


def entropy_bits(plane: Bytes) -> float:
    """Order-0 entropy of the bytes, in bits per byte; what an ideal Huffman-like coder would need."""
    counts = np.bincount(plane, minlength=256)
    share = counts[counts > 0] / plane.size
    return float(-(share * np.log2(share)).sum())


def all_equal(items: Words) -> bool:
    """Whether all rows (or all words) are the same, bit for bit; most tensors answer after the first few."""
    few = items[:64]
    return bool((few == few[0]).all()) and bool((items == items[0]).all())


def fill(out: memoryview, item: memoryview) -> None:
    """Repeat `item` (1, 2, 4, 8 or 16 bytes) throughout `out`, whose length is a multiple of it."""
    words = as_words(item, min(item.nbytes, 8))
    as_words(out, words.itemsize).reshape(-1, words.size)[:] = words if words.size > 1 else words[0]
