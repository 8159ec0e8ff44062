"""Whole reads, writes and comparisons on a file descriptor."""

from __future__ import annotations

import os
from collections.abc import Sequence

_MAX_PIECES = os.sysconf("SC_IOV_MAX")
_COMPARE_BYTES = 1 << 20


def write_all(file: int, views: Sequence[memoryview]) -> None:
    """Write all pieces one after the other, without joining them, however little the kernel takes at a time."""
    waiting = list(views)
    first = 0
    while first < len(waiting):
        written = os.writev(file, waiting[first : first + _MAX_PIECES])
        while first < len(waiting) and written >= waiting[first].nbytes:
            written -= waiting[first].nbytes
            first += 1
        if written:
            waiting[first] = waiting[first][written:]


def read_into(file: int, start: int, out: memoryview) -> int:
    """Fill `out` (flat bytes) with the bytes from `start`. Returns how many there were: fewer at the file's end."""
    done = 0
    while done < out.nbytes:
        count = os.preadv(file, [out[done:]], start + done)
        if not count:
            break
        done += count
    return done


def read(file: int, start: int, length: int) -> bytes:
    """The bytes from `start`, fewer at the file's end."""
    first = os.pread(file, length, start)
    if len(first) == length:
        return first
    out = bytearray(length)
    out[: len(first)] = first
    count = len(first) + read_into(file, start + len(first), memoryview(out)[len(first) :])
    return bytes(memoryview(out)[:count])


def equals(file: int, views: Sequence[memoryview]) -> bool:
    """Whether the file holds exactly these pieces; reads a block at a time."""
    at = 0
    for view in views:
        for begin in range(0, view.nbytes, _COMPARE_BYTES):
            block = bytes(view[begin : begin + _COMPARE_BYTES])
            if read(file, at + begin, len(block)) != block:
                return False
        at += view.nbytes
    return os.fstat(file).st_size == at
