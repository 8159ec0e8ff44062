"""The contract of every store, as tests. A store's test file subclasses this with a `store` fixture."""

from __future__ import annotations

import array
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.errors import KeyExists, KeyInvalid, KeyMissing, RangeMissing, TooLarge
from storage.store import ObjectInfo, Store

BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    ".hidden",
    "a/.tmp-1",
    "a b",
    "ä",
    "a\n",
    "x" * 201,
    "a/" * 300 + "a",
]

OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "get": lambda store, key: store.get(key),
    "get_range": lambda store, key: store.get_range(key, 0, 1),
    "get_into": lambda store, key: store.get_into(key, 0, memoryview(bytearray(1))),
    "size": lambda store, key: store.size(key),
    "put": lambda store, key: store.put(key, b"x"),
    "put_if_absent": lambda store, key: store.put_if_absent(key, b"x"),
    "delete": lambda store, key: store.delete(key),
}
READS = ("get", "get_range", "get_into", "size")


class StoreContract:
    """What holds for every store, one caller at a time."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError

    def test_what_was_put_is_read_back(self, store: Store) -> None:
        store.put("log/1", b"hello")
        store.put_if_absent("data/1/2/part.00", b"\x00\xff" * 1000)
        assert store.get("log/1") == b"hello"
        assert store.get("data/1/2/part.00") == b"\x00\xff" * 1000
        assert store.size("data/1/2/part.00") == 2000

    @pytest.mark.parametrize("write", ["put", "put_if_absent"])
    def test_pieces_are_written_one_after_the_other(self, store: Store, write: str) -> None:
        numbers = array.array("d", [1.5, -2.0])
        data = [b"", bytearray(b"ab"), memoryview(numbers), memoryview(b""), b"c"]
        getattr(store, write)("k", data)
        assert store.get("k") == b"ab" + numbers.tobytes() + b"c"

    @pytest.mark.parametrize("write", ["put", "put_if_absent"])
    @pytest.mark.parametrize("data", [b"", [], [b"", b""]])
    def test_an_empty_object_is_an_object(self, store: Store, write: str, data: object) -> None:
        getattr(store, write)("empty", data)
        assert store.get("empty") == b""
        assert store.get("empty", max_bytes=0) == b""
        assert store.get_range("empty", 0, 0) == b""
        assert store.size("empty") == 0
        assert list(store.list()) == [ObjectInfo(key="empty", size=0)]
        with pytest.raises(RangeMissing):
            store.get_range("empty", 0, 1)

    @pytest.mark.parametrize("operation", READS)
    def test_a_missing_object_is_named_in_the_error(self, store: Store, operation: str) -> None:
        store.put("there/1", b"x")
        for key in ("not/there", "there/1/below", "there"):
            with pytest.raises(KeyMissing) as caught:
                OPERATIONS[operation](store, key)
            assert f"{store.url}/{key}" in str(caught.value)

    def test_deleting_is_complete_and_may_be_repeated(self, store: Store) -> None:
        store.put("a/b/c", b"x")
        store.put("a/d", b"y")
        for _ in range(2):
            store.delete("a/b/c")
        store.delete("never/there")
        store.delete("a")  # the path above an object is not an object
        assert [info.key for info in store.list()] == ["a/d"]
        with pytest.raises(KeyMissing):
            store.get("a/b/c")
        store.put_if_absent("a/b/c", b"z")
        assert store.get("a/b/c") == b"z"

    def test_more_than_the_reader_allows_is_refused(self, store: Store) -> None:
        store.put("k", b"12345")
        assert store.get("k", max_bytes=5) == b"12345"
        assert store.get("k", max_bytes=6) == b"12345"
        for bound in (4, 1, 0):
            with pytest.raises(TooLarge):
                store.get("k", max_bytes=bound)

    @pytest.mark.parametrize(("start", "length"), [(0, 10), (0, 1), (3, 4), (9, 1), (10, 0), (0, 0)])
    def test_a_range_is_exactly_those_bytes(self, store: Store, start: int, length: int) -> None:
        whole = b"0123456789"
        store.put("k", whole)
        assert store.get_range("k", start, length) == whole[start : start + length]
        out = bytearray(b"#" * (length + 2))
        store.get_into("k", start, memoryview(out)[1:-1])
        assert out == b"#" + whole[start : start + length] + b"#"

    @pytest.mark.parametrize(("start", "length"), [(0, 11), (9, 2), (10, 1), (11, 0), (50, 3), (-1, 2)])
    def test_a_range_that_is_not_there_is_refused(self, store: Store, start: int, length: int) -> None:
        store.put("k", b"0123456789")
        with pytest.raises(RangeMissing):
            store.get_range("k", start, length)
        out = bytearray(b"#" * length)
        with pytest.raises(RangeMissing):
            store.get_into("k", start, memoryview(out))

    def test_get_into_fills_typed_buffers(self, store: Store) -> None:
        numbers = array.array("d", [1.0, 2.0, 3.0])
        store.put("k", memoryview(numbers))
        out = array.array("d", [0.0, 0.0])
        store.get_into("k", 8, memoryview(out))
        assert list(out) == [2.0, 3.0]

    def test_put_replaces(self, store: Store) -> None:
        for body in (b"long first version", b"short", b"", b"again"):
            store.put("k", body)
            assert store.get("k") == body

    def test_put_if_absent_never_changes_an_object(self, store: Store) -> None:
        store.put_if_absent("k", b"first")
        for other in (b"other", b"", b"firs", b"first!", b"FIRST", [b"fi", b"rsT"]):
            with pytest.raises(KeyExists) as caught:
                store.put_if_absent("k", other)
            assert f"{store.url}/k" in str(caught.value)
        assert store.get("k") == b"first"

    def test_put_if_absent_may_be_repeated_with_the_same_bytes(self, store: Store) -> None:
        store.put_if_absent("k", [b"fir", b"st"])
        store.put_if_absent("k", b"first")
        store.put_if_absent("k", [b"f", b"", b"irst"])
        assert store.get("k") == b"first"

    def test_a_listing_is_ordered_by_key(self, store: Store) -> None:
        keys = ["a-b", "a.b", "a/b", "a/b-c/d", "a/b.c", "a0", "b/0/1", "b/0/2", "b/00", "z", "A", "_"]
        for number, key in enumerate(keys):
            store.put(key, b"x" * number)
        want = sorted((key, number) for number, key in enumerate(keys) if key != "a/b")
        store.delete("a/b")
        assert [(info.key, info.size) for info in store.list()] == want
        for prefix in ("a", "a/", "a/b", "a/b-c/", "b/0", "b/0/", "b/0/2", "zz", "none/at/all", "z/"):
            assert [info.key for info in store.list(prefix)] == [key for key, _ in want if key.startswith(prefix)]

    def test_a_listing_of_nothing_is_empty(self, store: Store) -> None:
        assert list(store.list()) == []
        assert list(store.list("log/")) == []

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_a_key_that_could_leave_the_root_is_refused(self, store: Store, key: str) -> None:
        for operation in OPERATIONS.values():
            with pytest.raises(KeyInvalid):
                operation(store, key)
        if key and not key.endswith("/"):
            with pytest.raises(KeyInvalid):
                store.list(key)

    def test_objects_larger_than_a_block_survive(self, store: Store) -> None:
        body = bytes(range(256)) * 12_289  # 3 MB, no multiple of anything
        store.put_if_absent("big", [body[:1], body[1:2_000_000], body[2_000_000:]])
        store.put_if_absent("big", body)
        assert store.get("big") == body
        assert store.get_range("big", 1_000_001, 2_000_000) == body[1_000_001:3_000_001]
        with pytest.raises(KeyExists):
            store.put_if_absent("big", body[:-1] + b"!")

    def test_nothing_temporary_is_left_or_swept_from_the_living(self, store: Store) -> None:
        store.put("a/b", b"1")
        assert store.sweep_temporary(older_than_s=0.0) == 0
        assert store.get("a/b") == b"1"


class SharedStoreContract(StoreContract):
    """What holds besides where several writers may share the store."""

    def test_it_says_that_it_may_be_shared(self, store: Store) -> None:
        assert store.conditional

    def test_of_threads_that_race_for_a_key_one_wins(self, store: Store) -> None:
        contenders = 6
        barrier = threading.Barrier(contenders)

        def contend(me: int) -> list[int]:
            won = []
            for turn in range(8):
                barrier.wait(30)
                try:
                    store.put_if_absent(f"log/{turn}", f"by {me} in {turn}".encode())
                except KeyExists:
                    # Whoever lost can read the winner's bytes at once.
                    assert store.get(f"log/{turn}") != f"by {me} in {turn}".encode()
                else:
                    won.append(turn)
            return won

        with ThreadPoolExecutor(contenders) as pool:
            won = list(pool.map(contend, range(contenders)))
        assert sorted(turn for turns in won for turn in turns) == list(range(8))
        for me, turns in enumerate(won):
            for turn in turns:
                assert store.get(f"log/{turn}") == f"by {me} in {turn}".encode()

    def test_threads_that_put_the_same_bytes_all_win(self, store: Store) -> None:
        barrier = threading.Barrier(4)

        def repeat(_: int) -> None:
            for turn in range(5):
                barrier.wait(30)
                store.put_if_absent(f"log/{turn}", b"the same")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(repeat, range(4)))
        assert [info.size for info in store.list("log/")] == [8] * 5

    def test_a_reader_sees_the_old_bytes_or_the_new(self, store: Store) -> None:
        versions = [bytes([number]) * 300_000 for number in (1, 2)]
        store.put("hint", versions[0])
        done = threading.Event()

        def write() -> None:
            try:
                for turn in range(10):
                    store.put("hint", versions[turn % 2])
            finally:
                done.set()

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write)
            seen = 0
            while not done.is_set() or not seen:
                assert store.get("hint") in versions
                seen += 1
            writer.result()
