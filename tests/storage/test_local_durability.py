"""What is on the disk, and when: order of system calls, crashes, full and failing disks."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from pathlib import Path

import pytest

from storage.errors import OutcomeUnknown, StoreFailed, StoreFull, StoreUnavailable, StoreUnsupported
from storage.local import LocalStore
from storage.temporary import new_name, owner_of
from tests.storage.processes import names, python

PUT = """
import sys
from storage.local import LocalStore
store = LocalStore(sys.argv[1])
for key in sys.argv[3:]:
    getattr(store, sys.argv[2])(key, [b"12345", b"67890"])
"""


def traced(directory: Path, *arguments: str) -> list[tuple[str, str]]:
    """(call, the names in it) of what PUT does to files, in order."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed, so system calls cannot be watched")
    calls = "trace=fsync,fdatasync,link,linkat,rename,renameat,renameat2,mkdir,mkdirat,write,writev,unlinkat"
    log = directory / "strace.log"
    done = python(PUT, *arguments, before=(strace, "-f", "-y", "-s", "0", "-e", calls, "-o", str(log)))
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr
    found = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += 0|\d+ +(writev)\((.*)\) += \d+", line)
        if call and str(directory) in line:
            name, inside = (call[1], call[2]) if call[1] else (call[3], call[4])
            found.append((name, inside))
    return found


def index(calls: list[tuple[str, str]], name: str, *parts: str) -> int:
    """Where the first such call is."""
    for at, (call, inside) in enumerate(calls):
        if call == name and all(re.search(part, inside) for part in parts):
            return at
    raise AssertionError(f"no {name} with {parts} in {calls}")


def ends(path: Path) -> str:
    return re.escape(f"{path}>") + "$"


@pytest.mark.parametrize(("operation", "naming"), [("put_if_absent", "linkat"), ("put", "rename(at2?)?")])
def test_data_are_synced_before_they_get_a_name_and_every_directory_after(
    tmp_path: Path, operation: str, naming: str
) -> None:
    root = tmp_path / "new" / "root"
    calls = traced(tmp_path, str(root), operation, "data/5/part")
    named = [at for at, (name, _) in enumerate(calls) if re.fullmatch(naming, name)]
    assert len(named) == 1
    above = root / "data" / "5"
    written = index(calls, "writev", r"\.tmp-")
    synced = index(calls, "fsync", re.escape(str(above)) + r"/\.tmp-")
    assert written < synced < named[0]
    assert named[0] < max(at for at, call in enumerate(calls) if call[0] == "fsync" and re.search(ends(above), call[1]))
    # Each new directory's entry is on disk before the object gets its name.
    for made, holder in [(tmp_path / "new", tmp_path), (root, tmp_path / "new"), (root / "data", root)]:
        make = (
            next(at for at, call in enumerate(calls) if call[0].startswith("mkdir") and f'"{made}"' in call[1])
            if made != root / "data"
            else index(calls, "mkdirat", re.escape(f"{root}>"), '"data"')
        )
        assert any(call == "fsync" and re.search(ends(holder), inside) for call, inside in calls[make : named[0]]), (
            f"{holder} is not synced after {made} was made: {calls}"
        )


def test_directories_known_to_be_on_disk_are_not_synced_again(tmp_path: Path) -> None:
    calls = traced(tmp_path, str(tmp_path / "root"), "put_if_absent", "log/1", "log/2", "log/3")
    first = index(calls, "linkat", '"1"')
    later = [inside for name, inside in calls[first + 1 :] if name == "fsync"]
    assert sum(".tmp-" in inside for inside in later) == 2
    assert sum(inside.endswith("/log>") for inside in later) == 3
    assert len(later) == 5


class SyncRecorder:
    """Counts fsync by inode, and fails on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[tuple[int, bool]] = []  # inode, is a directory
        self.fail_files = self.fail_directories = False
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        directory = stat.S_ISDIR(status.st_mode)
        self.synced.append((status.st_ino, directory))
        if self.fail_directories if directory else self.fail_files:
            raise OSError(errno.EIO, "on purpose")
        self._fsync(descriptor)


def test_a_directory_that_was_deleted_and_made_again_is_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path / "root")
    store.put("log/1", b"1")
    recorder = SyncRecorder(monkeypatch)
    shutil.rmtree(tmp_path / "root" / "log")
    store.put("log/2", b"2")
    root, log = (tmp_path / "root").stat().st_ino, (tmp_path / "root" / "log").stat().st_ino
    assert (root, True) in recorder.synced
    assert (log, True) in recorder.synced
    shutil.rmtree(tmp_path / "root")
    recorder.synced.clear()
    store.put_if_absent("log/3", b"3")
    assert (tmp_path.stat().st_ino, True) in recorder.synced
    assert [info.key for info in store.list()] == ["log/3"]
    store.close()


def test_a_repeated_put_if_absent_syncs_what_another_writer_may_not_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1").write_bytes(b"same")  # as left by a writer that died before it synced
    recorder = SyncRecorder(monkeypatch)
    LocalStore(tmp_path).put_if_absent("log/1", b"same")
    inodes = [(tmp_path / "log" / "1").stat().st_ino, (tmp_path / "log").stat().st_ino, tmp_path.stat().st_ino]
    assert set(inodes) <= {inode for inode, _ in recorder.synced}


@pytest.mark.parametrize("operation", ["put", "put_if_absent"])
def test_a_file_whose_fsync_failed_is_never_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("log/1", b"before")
    recorder = SyncRecorder(monkeypatch)
    recorder.fail_files = True
    with pytest.raises(StoreFailed):
        getattr(store, operation)("log/2", b"x")
    failed = [inode for inode, directory in recorder.synced if not directory]
    assert len(failed) == 1
    assert names(tmp_path / "log") == ["1"], "the temporary file is left"
    recorder.fail_files = False
    getattr(store, operation)("log/2", b"x")  # a new file
    assert store.get("log/2") == b"x"


def test_a_failed_fsync_of_the_directory_leaves_the_outcome_unknown_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("log/1", b"before")
    recorder = SyncRecorder(monkeypatch)
    recorder.fail_directories = True
    with pytest.raises(OutcomeUnknown):
        store.put_if_absent("log/2", b"x")
    recorder.fail_directories = False
    recorder.synced.clear()
    # The kernel would now report success for what it may have lost.
    with pytest.raises(StoreFailed):
        store.put_if_absent("log/2", b"x")
    with pytest.raises(StoreFailed):
        store.put("log/3", b"x")
    assert recorder.synced == []
    assert store.get("log/2") == b"x"


@pytest.mark.parametrize("point", ["local.written", "local.synced", "local.named"])
@pytest.mark.parametrize("operation", ["put", "put_if_absent"])
def test_a_writer_killed_at_any_point_leaves_a_whole_object_or_none(tmp_path: Path, point: str, operation: str) -> None:
    done = python(PUT, str(tmp_path), operation, "log/1", RESILIENT_FAILPOINTS=f"{point}=kill")
    assert done.returncode == -9, done.stderr
    store = LocalStore(tmp_path)
    want = {"log/1": b"1234567890"} if point == "local.named" else {}
    assert {info.key: store.get(info.key) for info in store.list()} == want
    left = [name for name in names(tmp_path / "log") if name.startswith(".tmp-")]
    assert len(left) == (0 if point == "local.named" else 1)
    assert store.sweep_temporary(older_than_s=3600.0) == len(left)
    assert [name for name in names(tmp_path / "log") if name.startswith(".")] == []
    store.put_if_absent("log/1", b"1234567890")
    assert store.get("log/1") == b"1234567890"


def test_files_of_other_machines_are_swept_by_age_and_of_the_living_never(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("log/1", b"x")
    mine = tmp_path / "log" / new_name()
    owner = owner_of(mine.name)
    assert owner is not None
    # This process's number, given before to another process.
    reused = tmp_path / "log" / f".tmp-{owner.machine}-{owner.process}-{int(owner.started) - 1}-abcdef"
    reused.write_bytes(b"half")
    foreign = tmp_path / "log" / ".tmp-0123456789ab-77-123-abcdef"
    unknown = tmp_path / ".tmp-something"
    for path in (mine, foreign, unknown):
        path.write_bytes(b"half")
    assert store.sweep_temporary(older_than_s=3600.0) == 1
    assert not reused.exists()
    for path in (mine, foreign, unknown):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert store.sweep_temporary(older_than_s=3600.0) == 2
    assert mine.exists()
    assert store.get("log/1") == b"x"


def test_a_write_whose_directory_is_swept_away_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    link = os.link
    removed = []

    def link_after_removal(*arguments: object, **options: object) -> None:
        if len(removed) < 3:
            removed.append(shutil.rmtree(tmp_path / "data"))
        link(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", link_after_removal)
    store.put_if_absent("data/1/part", b"x")
    assert len(removed) == 3
    assert store.get("data/1/part") == b"x"


def test_a_directory_that_always_vanishes_is_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        shutil.rmtree(tmp_path / "data")
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreUnavailable):
        LocalStore(tmp_path).put_if_absent("data/1/part", b"x")


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EIO, errno.ETIMEDOUT])
def test_a_link_over_nfs_that_worked_but_says_otherwise_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    link = os.link

    def link_and_lie(*arguments: object, **options: object) -> None:
        link(*arguments, **options)  # type: ignore[arg-type]
        raise OSError(number, "the reply was lost and the request repeated")

    monkeypatch.setattr(os, "link", link_and_lie)
    store = LocalStore(tmp_path)
    store.put_if_absent("log/1", b"x")
    assert store.get("log/1") == b"x"
    assert names(tmp_path / "log") == ["1"]


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EIO, OutcomeUnknown),
        (errno.ETIMEDOUT, OutcomeUnknown),
        (errno.EPERM, StoreUnsupported),
        (errno.EOPNOTSUPP, StoreUnsupported),
        (errno.ENOSPC, StoreFull),
    ],
)
def test_a_link_that_fails_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(number, "on purpose")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(error):
        LocalStore(tmp_path).put_if_absent("log/1", b"x")
    assert names(tmp_path / "log") == []
