"""Arenas: shared without copies, never cut under a reader, gone with their last holder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resilient.errors import WireError
from resilient.node.arena import PAGE_BYTES, Arena, MappedArena


def test_what_one_side_writes_the_other_reads() -> None:
    arena = Arena(10_000)
    other = MappedArena(os.dup(arena.fd), 10_000)
    arena.view[9_990:10_000] = b"0123456789"
    assert bytes(other.view[9_990:]) == b"0123456789"
    other.close()
    arena.close()


def test_a_reader_cannot_write_and_nobody_can_shrink_it() -> None:
    arena = Arena(10)
    assert arena.nbytes == PAGE_BYTES
    other = MappedArena(os.dup(arena.fd), 10)
    assert other.view.readonly
    with pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)
    other.close()
    arena.close()


def test_the_memory_is_there_before_it_is_used() -> None:
    arena = Arena(64 * PAGE_BYTES)
    assert os.fstat(arena.fd).st_blocks * 512 >= 64 * PAGE_BYTES
    arena.close()


def test_a_mapping_outlives_the_descriptor_of_its_maker() -> None:
    arena = Arena(100)
    other = MappedArena(os.dup(arena.fd), 100)
    arena.view[:4] = b"kept"
    arena.close()
    assert bytes(other.view[:4]) == b"kept"
    other.close()


def test_what_is_no_arena_is_refused_and_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_BYTES))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(WireError):
        MappedArena(os.open(path, os.O_RDONLY), 100)
    arena = Arena(100)
    for nbytes in (PAGE_BYTES + 1, 0):
        with pytest.raises(WireError, match="is not an arena"):
            MappedArena(os.dup(arena.fd), nbytes)
    unsealed = os.memfd_create("x")
    os.ftruncate(unsealed, 100)
    with pytest.raises(WireError):
        MappedArena(unsealed, 100)
    arena.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
