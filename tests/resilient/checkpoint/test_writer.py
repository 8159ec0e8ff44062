"""Writing: what is on the store, in which order, when it stops, and how little memory it takes."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import xxhash

from resilient.checkpoint import writer
from resilient.checkpoint.format import data_prefix, part_key
from resilient.checkpoint.geometry import Box, whole
from resilient.checkpoint.items import Shard, Slot, TensorInfo
from resilient.checkpoint.parallel import Pools, Rooms, in_order
from resilient.checkpoint.reader import open_checkpoint
from resilient.checkpoint.writer import WriteJob, persist
from resilient.errors import SaveCancelled, StateInvalid
from storage.errors import KeyExists, StoreFull
from storage.failpoint import FailpointReached, arm
from storage.memory import MemoryStore
from tests.resilient.checkpoint.saved import (
    NONCE,
    VALUES,
    load,
    rows,
    same,
    save,
    snapshot,
    some_state,
    tensor,
    trained,
)

PREFIX = data_prefix(1, 10, NONCE)


@pytest.fixture
def store():
    return MemoryStore("writer")


@pytest.fixture
def small_parts(monkeypatch):
    """Chunks of 64 KiB and parts of 256 KiB, so that small states have many."""
    monkeypatch.setattr(writer, "CHUNK_BYTES", 64 << 10)
    monkeypatch.setattr(writer, "PART_BYTES", 256 << 10)
    monkeypatch.setattr(writer, "MIN_PART_BYTES", 256 << 10)
    monkeypatch.setattr(writer, "MIN_ROOM_BYTES", 16 << 10)


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm("")


def big_state():
    """2 MiB of weights and 1 MiB of noise."""
    rng = np.random.default_rng(4)
    return [
        tensor("a", "float32", trained(rng, (1024, 512))),
        tensor("b", "uint8", np.frombuffer(rng.bytes(1 << 20), np.uint8)),
    ]


def job(tensors, **fields):
    return WriteJob(**{"prefix": PREFIX, "writer": "n00000", "snapshots": [snapshot(rows(tensors, 0, 1))], **fields})


@pytest.mark.parametrize("codec", ["raw", "fast", "auto"])
@pytest.mark.parametrize("writers", [1, 3])
def test_what_is_saved_is_loaded_bit_for_bit(store, codec, writers):
    state = some_state(1)
    loaded, values = load(store, save(store, state, codec=codec, writers=writers))
    assert same(loaded, state)
    assert values == VALUES


def test_every_object_lies_under_the_prefix_and_is_named_by_the_manifest(store, small_parts):
    ref = save(store, big_state(), writers=2)
    manifest = open_checkpoint(store, ref).manifest
    assert sorted(item.key for item in store.list()) == sorted(manifest.keys)
    assert len(manifest.writers[0].parts) > 3
    for writer_ref in manifest.writers:
        assert [part.size for part in writer_ref.parts] == [store.size(part.key) for part in writer_ref.parts]
        assert all(part.size <= 256 << 10 for part in writer_ref.parts)
        assert sum(part.size for part in writer_ref.parts) == writer_ref.stored_bytes


def test_the_same_snapshot_gives_the_same_bytes_whatever_the_threads(small_parts):
    written = []
    for threads in (1, 5):
        store = MemoryStore(f"threads{threads}")
        save(store, big_state(), threads=threads)
        written.append({item.key: store.get(item.key) for item in store.list()})
    assert written[0] == written[1]


def test_hashes_are_those_of_the_snapshot(store, small_parts):
    state = big_state()
    stored = open_checkpoint(store, save(store, state)).stored()
    for item in state:
        for chunk in stored[item.info.name].chunks:
            raw = np.ascontiguousarray(item.bits[chunk.box.slices()]).tobytes()
            assert xxhash.xxh3_128_digest(raw) == chunk.raw_hash


def test_a_save_may_be_repeated_and_another_under_the_same_nonce_is_refused(store):
    assert save(store, some_state(1)) == save(store, some_state(1))
    with pytest.raises(KeyExists):
        save(store, some_state(2))


class Recording(MemoryStore):
    """Notes every put; `during` is called inside each."""

    def __init__(self):
        super().__init__("recording")
        self.puts, self.during = [], lambda key: None

    def put_if_absent(self, key, data):
        self.during(key)
        super().put_if_absent(key, data)
        self.puts.append(key)


def test_the_index_is_put_when_all_parts_are_and_the_manifest_last(small_parts):
    store = Recording()
    ref = save(store, big_state())
    kinds = [key.rsplit("/", 1)[1] for key in store.puts]
    assert kinds[-2:] == ["n00000.index", "manifest"]
    assert len(kinds) == len(set(kinds)) == len(open_checkpoint(store, ref).manifest.keys)


@pytest.mark.parametrize(
    ("failpoint", "left"),
    [("writer.part@1", "part"), ("writer.part@3", "part"), ("writer.index", "index"), ("manifest.before", "manifest")],
)
def test_a_failpoint_stops_before_its_object(store, small_parts, failpoint, left):
    name, _, at = failpoint.partition("@")
    arm(f"{name}=raise" + (f"@{at}" if at else ""))
    with pytest.raises(FailpointReached):
        save(store, big_state())
    keys = [item.key for item in store.list()]
    assert not any(key.endswith("manifest") for key in keys)
    assert any(key.endswith(".index") for key in keys) == (left == "manifest")
    arm("")
    assert same(load(store, save(store, big_state()))[0], big_state())


def test_a_store_that_fails_ends_the_save_with_its_own_error(small_parts):
    store = Recording()

    def full(key):
        if key.endswith(".00002"):
            raise StoreFull("no space left")

    store.during = full
    with pytest.raises(StoreFull):
        save(store, big_state())
    assert not any(key.endswith(("index", "manifest")) for key in store.puts)


@pytest.mark.parametrize("after", [0, 1, 5, 20])
def test_a_save_that_is_cancelled_stops_and_leaves_no_index(store, small_parts, after):
    asked = iter(range(10**6))
    with pytest.raises(SaveCancelled):
        persist(store, job(big_state()), threads=2, cancelled=lambda: next(asked) >= after)
    assert not any(item.key.endswith("index") for item in store.list())


def test_it_can_be_cancelled_while_the_store_is_slow(small_parts):
    store, giving_up = Recording(), threading.Event()
    store.during = lambda key: giving_up.set()
    with pytest.raises(SaveCancelled):
        persist(store, job(big_state()), threads=2, cancelled=giving_up.is_set)
    assert len(store.puts) <= writer.PUTS_IN_FLIGHT


def test_encoded_chunks_wait_in_few_rooms_and_all_come_back(small_parts):
    store, memory, lent, most = Recording(), Rooms(64 << 10), [0], [0]
    borrow, give_back = memory.borrow, memory.give_back

    def counted_borrow():
        lent[0] += 1
        most[0] = max(most[0], lent[0])
        return borrow()

    def counted_give_back(rooms):
        rooms = list(rooms)
        lent[0] -= len(rooms)
        give_back(rooms)

    memory.borrow, memory.give_back = counted_borrow, counted_give_back
    weights = trained(np.random.default_rng(0), (4096, 1024))  # 16 MiB: 256 chunks, more than may wait
    persist(store, job([tensor("a", "float32", weights)]), threads=2, memory=memory)
    assert lent[0] == 0
    rooms_of_a_part = (256 << 10) // (32 << 10)  # a room is held only by a chunk of more than half of it
    assert 0 < most[0] <= (writer.PUTS_IN_FLIGHT + 1) * rooms_of_a_part + 2 * 2 + 2

    def fail(key):
        raise StoreFull("no space left")

    store.during = fail
    with pytest.raises(StoreFull):
        persist(
            store,
            replace(job([tensor("a", "float32", weights)]), prefix=data_prefix(1, 11, NONCE)),
            threads=2,
            memory=memory,
        )
    assert lent[0] == 0


def test_slots_need_not_be_in_order_nor_in_one_buffer(store):
    state = some_state(1)
    boxes = list(rows(state, 0, 1))
    halves = [snapshot(boxes[1::2][::-1]), snapshot(boxes[::2])]
    ref = persist(store, job([], snapshots=halves), threads=2)
    assert ref.raw_bytes == sum(item.bits.nbytes for item in state)
    assert ref.tensors == len(state)


INFO = TensorInfo(name="w", dtype="float32", shape=(4, 4))
SHARD = Shard(tensor=INFO, box=whole((4, 4)))


def test_what_a_job_cannot_mean_is_refused_before_anything_is_written(store):
    buffer = memoryview(bytes(64))
    long_name = Shard(tensor=replace(INFO, name="x" * 2000), box=SHARD.box)
    other = Shard(tensor=replace(INFO, dtype="int32"), box=Box((0, 0), (1, 4)))
    for snapshots, fields in (
        ([(buffer, [Slot(shard=SHARD, offset=1)])], {}),
        ([(buffer, [Slot(shard=SHARD, offset=-1)])], {}),
        ([(buffer, [Slot(shard=long_name, offset=0)])], {}),
        ([(buffer, [Slot(shard=SHARD, offset=0), Slot(shard=other, offset=0)])], {}),
        ([], {"values": [("v", None, b"1"), ("v", None, b"2")]}),
        ([], {"codec": "gzip"}),
    ):
        with pytest.raises(StateInvalid):
            persist(store, job([], snapshots=snapshots, **fields), threads=1)
    assert list(store.list()) == []


def test_threads_run_at_the_priority_that_is_wanted_when_they_begin():
    import os

    wanted = [3]

    def priority(_):
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    base = os.getpriority(os.PRIO_PROCESS, 0)
    with Pools(2, lambda: wanted[0]) as pools:
        low = set(in_order(pools, priority, range(8), ahead=3))
        wanted[0] = 0
        normal = set(in_order(pools, priority, range(8), ahead=3))
    assert (low, normal) == ({max(3, base)}, {base})


def test_results_come_in_order_with_few_begun_ahead():
    begun = []
    with Pools(3, lambda: 0) as pools:
        for taken, result in enumerate(in_order(pools, lambda n: begun.append(n) or n, range(50), ahead=4)):
            assert result == taken
            assert len(begun) <= taken + 4
    assert sorted(begun) == list(range(50))


def test_a_part_is_named_by_its_number():
    assert part_key(PREFIX, "n00003", 7) == f"{PREFIX}/n00003.00007"
