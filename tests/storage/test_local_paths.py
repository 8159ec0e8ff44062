"""What may lie in a store's directory besides its objects."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from storage import files
from storage.errors import KeyInvalid, KeyMissing, RangeMissing, StoreDenied, StoreError
from storage.local import LocalStore
from storage.posix_errors import typed
from tests.storage.contract import OPERATIONS, READS
from tests.storage.processes import names


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "secret").write_bytes(b"secret")
    return directory


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "root")
    store.put("a/b", b"inside")
    return store


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_linked_directory_is_not_entered(tmp_path: Path, outside: Path, store: LocalStore, operation: str) -> None:
    (tmp_path / "root" / "leads").symlink_to(outside)
    with pytest.raises(StoreDenied, match="symbolic link"):
        OPERATIONS[operation](store, "leads/secret")
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize("operation", READS)
@pytest.mark.parametrize("target", ["../outside/secret", "a/b"])
def test_a_linked_object_is_not_read(
    tmp_path: Path, outside: Path, store: LocalStore, operation: str, target: str
) -> None:
    (tmp_path / "root" / "leads").symlink_to(target)
    with pytest.raises(StoreDenied):
        OPERATIONS[operation](store, "leads")


def test_writing_never_goes_through_a_linked_object(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    link = tmp_path / "root" / "leads"
    link.symlink_to(outside / "secret")
    with pytest.raises(StoreDenied):
        store.put_if_absent("leads", b"other")
    store.put("leads", b"other")
    assert not link.is_symlink()
    assert (outside / "secret").read_bytes() == b"secret"


def test_the_root_may_be_a_link(tmp_path: Path, store: LocalStore) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    alias = LocalStore(tmp_path / "alias")
    alias.put_if_absent("a/c", b"1")
    assert store.get("a/c") == b"1"


def test_strangers_are_not_listed(tmp_path: Path, outside: Path, store: LocalStore) -> None:
    root = tmp_path / "root"
    (root / ".tmp-1").write_bytes(b"x")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x").write_bytes(b"x")
    (root / "with blank").write_bytes(b"x")
    (root / "leads").symlink_to(outside)
    (root / "file-link").symlink_to(outside / "secret")
    os.mkfifo(root / "pipe")
    assert [info.key for info in store.list()] == ["a/b"]


@pytest.mark.timeout(20)
def test_a_planted_pipe_does_not_block_a_reader(tmp_path: Path, store: LocalStore) -> None:
    os.mkfifo(tmp_path / "root" / "pipe")
    for operation in READS:
        with pytest.raises(KeyMissing):
            OPERATIONS[operation](store, "pipe")


def test_a_key_above_or_below_another_is_refused(store: LocalStore) -> None:
    for write in (store.put, store.put_if_absent):
        with pytest.raises(KeyInvalid):
            write("a", b"x")
        with pytest.raises(KeyInvalid):
            write("a/b/c", b"x")
    assert [info.key for info in store.list()] == ["a/b"]
    assert not [name for name in names(Path(store.url)) if name.startswith(".")]


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "never")
    assert list(store.list()) == []
    with pytest.raises(KeyMissing):
        store.get("log/0")
    store.delete("log/0")
    assert store.sweep_temporary(older_than_s=0.0) == 0
    assert not (tmp_path / "never").exists()


def test_deleting_removes_directories_that_are_left_empty(tmp_path: Path, store: LocalStore) -> None:
    store.put("data/1/2/part", b"x")
    store.put("data/1/3/part", b"x")
    store.delete("data/1/2/part")
    assert names(tmp_path / "root" / "data" / "1") == ["3"]
    store.delete("data/1/3/part")
    store.delete("a/b")
    assert names(tmp_path / "root") == []


def test_no_descriptor_leaks(tmp_path: Path, store: LocalStore) -> None:
    def use() -> None:
        for number in range(100):  # more directories than are remembered
            store.put(f"d{number}/x", b"1")
        for operation in OPERATIONS.values():
            for key in ("a/b", "a", "none/at/all", "d1/x/below"):
                try:
                    operation(store, key)
                except StoreError:
                    continue
        list(store.list())

    use()
    before = len(names(Path("/proc/self/fd")))
    use()
    assert len(names(Path("/proc/self/fd"))) == before
    store.close()
    assert len(names(Path("/proc/self/fd"))) < before


def test_a_file_that_shrinks_while_it_is_read_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("big", b"x" * 1000)
    monkeypatch.setattr(os, "pread", lambda file, length, at: b"x" * 10 if at == 0 else b"")
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: 0)
    for operation in ("get", "get_range"):
        with pytest.raises(RangeMissing):
            store.get("big") if operation == "get" else store.get_range("big", 0, 100)
    with pytest.raises(RangeMissing):
        store.get_into("big", 0, memoryview(bytearray(100)))


def test_a_kernel_that_takes_and_gives_little_at_a_time_loses_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, preadv, pread = os.writev, os.preadv, os.pread
    calls = []

    def stingy_writev(file: int, buffers: list[memoryview]) -> int:
        assert len(buffers) <= os.sysconf("SC_IOV_MAX")
        calls.append(len(buffers))
        return writev(file, [buffers[0][:3]])

    monkeypatch.setattr(os, "writev", stingy_writev)
    monkeypatch.setattr(os, "pread", lambda file, length, at: pread(file, min(length, 2), at))
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:4]], at))
    pieces = [b"0123456789", b"ab", b"", b"c"] * 20
    store.put("k", pieces)
    assert store.get("k") == b"".join(pieces)
    assert store.get_range("k", 5, 50) == b"".join(pieces)[5:55]
    store.put_if_absent("k", b"".join(pieces))
    assert len(calls) > 80


@pytest.mark.parametrize(
    ("body", "same"), [(b"abcdef", True), (b"abcdefg", False), (b"abcde", False), (b"abcdeX", False), (b"", False)]
)
def test_a_file_equals_exactly_its_pieces(tmp_path: Path, body: bytes, same: bool) -> None:
    (tmp_path / "file").write_bytes(body)
    file = os.open(tmp_path / "file", os.O_RDONLY)
    assert files.equals(file, [memoryview(b"abc"), memoryview(b"def")]) is same
    os.close(file)


def test_thousands_of_pieces_are_written(store: LocalStore) -> None:
    pieces = [bytes([number % 256]) * (number % 3) for number in range(5000)]
    store.put_if_absent("k", pieces)
    assert store.get("k") == b"".join(pieces)


def test_signals_do_not_break_a_write() -> None:
    read_end, write_end = os.pipe()  # takes 64 KB at a time, so the writer waits and is interrupted
    body = bytes(range(256)) * 8_000
    got = bytearray()

    def drain() -> None:
        while len(got) < len(body):
            got.extend(os.read(read_end, 20_000))

    reader = threading.Thread(target=drain)
    arrived = []
    before = signal.signal(signal.SIGALRM, lambda *_: arrived.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        reader.start()
        while not arrived:
            signal.pause()
        files.write_all(write_end, [memoryview(body)[:1_000_000], memoryview(body)[1_000_000:]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    reader.join(10)
    assert got == body
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.ENOSPC, "StoreFull"),
        (errno.EDQUOT, "StoreFull"),
        (errno.EFBIG, "StoreFull"),
        (errno.EACCES, "StoreDenied"),
        (errno.EPERM, "StoreDenied"),
        (errno.EROFS, "StoreDenied"),
        (errno.ELOOP, "StoreDenied"),
        (errno.ENOENT, "KeyMissing"),
        (errno.ETIMEDOUT, "StoreUnavailable"),
        (errno.ESTALE, "StoreUnavailable"),
        (errno.EMFILE, "StoreUnavailable"),
        (errno.ENAMETOOLONG, "KeyInvalid"),
        (errno.EIO, "StoreFailed"),
        (errno.EINVAL, "StoreFailed"),
        (None, "StoreFailed"),
    ],
)
def test_error_numbers_become_typed_errors(number: int | None, name: str) -> None:
    error = typed(OSError(number, "with a secret") if number else OSError("with a secret"), "here/k")
    assert type(error).__name__ == name
    assert "secret" not in str(error)
    assert "here/k" in str(error)


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError, TimeoutError, ConnectionResetError])
def test_errors_without_a_number_are_told_by_their_class(kind: type[OSError]) -> None:
    want = {"FileNotFoundError": "KeyMissing", "PermissionError": "StoreDenied"}.get(kind.__name__, "StoreUnavailable")
    assert type(typed(kind("text"), "here")).__name__ == want


def test_a_disk_without_rights_denies(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def denied(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EROFS, "read-only")
        return opened(path, flags, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", denied)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StoreDenied, match="EROFS"):
            write("a/c", b"x")
