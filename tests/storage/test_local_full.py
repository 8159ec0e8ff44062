"""A disk, or a limit, that is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import StoreFull
from storage.local import LocalStore
from tests.storage.processes import names, python


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs rights that this process lacks")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("operation", ["put", "put_if_absent"])
def test_a_full_disk_refuses_and_keeps_what_it_has(small_disk: Path, operation: str) -> None:
    store = LocalStore(small_disk)
    write = getattr(store, operation)
    write("data/1", b"a" * 600_000)
    with pytest.raises(StoreFull) as caught:
        write("data/2", b"b" * 600_000)
    assert str(small_disk / "data" / "2") in str(caught.value)
    assert names(small_disk / "data") == ["1"], "the temporary file is left"
    assert store.get("data/1") == b"a" * 600_000
    write("data/3", b"c" * 100_000)
    store.close()


def test_a_file_size_limit_counts_as_full(tmp_path: Path) -> None:
    code = """
import resource, sys
from storage.errors import StoreFull
from storage.local import LocalStore
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    LocalStore(sys.argv[1]).put("data/1", [b"x" * 60_000, b"y" * 60_000])
except StoreFull as error:
    print(error.what)
"""
    done = python(code, str(tmp_path))
    assert "EFBIG" in done.stdout, done
    assert names(tmp_path / "data") == []
