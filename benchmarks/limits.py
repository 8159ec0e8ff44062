"""What this machine can do at best: memory copy, durable raw write, cold raw read."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

BLOCK_BYTES = 4 << 20


def memcpy_s(nbytes: int) -> float:
    """Seconds to copy `nbytes` between warm buffers with all threads: the floor of any snapshot. Best of five."""
    source = torch.empty(nbytes, dtype=torch.uint8).random_(0, 256)
    target = torch.empty_like(source).copy_(source)
    return min(_timed(lambda: target.copy_(source)) for _ in range(5))


def raw_write_s(folder: Path, nbytes: int) -> tuple[float, str]:
    """Seconds to make `nbytes` durable, by the best of several ways, and which one that was."""
    ways = {
        "write + fsync": lambda path: _write_buffered(path, nbytes),
        "O_DIRECT, preallocated, 1 thread": lambda path: _write_direct(path, nbytes, 1),
        "O_DIRECT, preallocated, 4 threads": lambda path: _write_direct(path, nbytes, 4),
    }
    best, name = float("inf"), ""
    for way, write in ways.items():
        path = folder / "raw"
        try:
            took = _timed(lambda write=write, path=path: write(path))  # type: ignore[misc]
        except OSError:
            continue  # a file system without O_DIRECT: the other ways count
        finally:
            path.unlink(missing_ok=True)
        if took < best:
            best, name = took, way
    return best, name


def cold_read_s(path: Path) -> float:
    """Seconds to read a file that is not in the page cache."""
    drop_cache(path)
    buffer = bytearray(BLOCK_BYTES)

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return _timed(read)


def drop_cache(folder: Path) -> None:
    """Make the next read of every file under `folder` (or of the file) come from the disk."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _timed(act: object) -> float:
    begun = time.perf_counter()
    act()  # type: ignore[operator]
    return time.perf_counter() - begun


def _write_buffered(path: Path, nbytes: int) -> None:
    block = os.urandom(BLOCK_BYTES)
    with open(path, "wb", buffering=0) as file:
        file.writelines(block for _ in range(nbytes // BLOCK_BYTES))
        os.fsync(file.fileno())


def _write_direct(path: Path, nbytes: int, threads: int) -> None:
    block = mmap.mmap(-1, BLOCK_BYTES)  # page-aligned, as O_DIRECT demands
    block.write(os.urandom(BLOCK_BYTES))
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        blocks = range(nbytes // BLOCK_BYTES)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda index: os.pwrite(descriptor, block, index * BLOCK_BYTES), blocks))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
