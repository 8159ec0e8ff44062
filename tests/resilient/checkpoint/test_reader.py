"""Reading: any part of any layout, every byte verified, lies of one object about another refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint import index_file, writer
from resilient.checkpoint.format import Manifest, PartRef, data_prefix, encode_manifest
from resilient.checkpoint.geometry import Box, whole
from resilient.checkpoint.items import Shard, TensorInfo
from resilient.checkpoint.plan_load import plan_load
from resilient.checkpoint.reader import element_type, open_checkpoint
from resilient.checkpoint.verify import verify
from resilient.checkpoint.writer import WriteJob, persist, put_manifest
from resilient.errors import CheckpointDamaged, FormatUnsupported, ShardInvalid
from resilient.log.entries import Ref
from storage.errors import StoreUnavailable
from storage.memory import MemoryStore
from tests.resilient.checkpoint.saved import NONCE, VALUES, load, same, save, snapshot, some_state, tensor, trained

PREFIX = data_prefix(1, 10, NONCE)


@pytest.fixture
def store():
    return MemoryStore("reader")


def read(checkpoint, wanted, **options):
    outputs = [np.empty(shard.box.shape, element_type(shard.tensor.dtype)) for shard in wanted]
    checkpoint.load(plan_load(checkpoint.stored(), wanted), outputs, **{"threads": 2, **options})
    return outputs


@settings(max_examples=60)
@given(st.data())
def test_any_boxes_can_be_read(data):
    store = MemoryStore("boxes")
    rng = np.random.default_rng(0)
    state = [tensor("w", "bfloat16", rng.integers(0, 9, (40, 17), np.uint16)), tensor("s", "float64", np.array(3.0))]
    checkpoint = open_checkpoint(store, save(store, state, writers=data.draw(st.integers(1, 3))))
    wanted = [Shard(tensor=state[1].info, box=whole(()))]
    for _ in range(data.draw(st.integers(0, 4))):
        start = (data.draw(st.integers(0, 40)), data.draw(st.integers(0, 17)))
        shape = (data.draw(st.integers(0, 40 - start[0])), data.draw(st.integers(0, 17 - start[1])))
        wanted.append(Shard(tensor=state[0].info, box=Box(start, shape)))
    first, *others = read(checkpoint, wanted)
    assert first.tobytes() == np.float64(3).tobytes()
    for shard, output in zip(wanted[1:], others, strict=True):
        assert (output == state[0].bits[shard.box.slices()]).all()


def test_progress_adds_up_to_what_was_wanted(store):
    state, done = some_state(1), []
    checkpoint = open_checkpoint(store, save(store, state))
    wanted = [Shard(tensor=item.info, box=whole(item.info.shape)) for item in state]
    read(checkpoint, wanted, progress=done.append)
    assert sum(done) == sum(shard.nbytes for shard in wanted)


def test_outputs_that_do_not_fit_are_refused_before_anything_is_read(store):
    state = [tensor("w", "float32", np.zeros((4, 4), np.float32))]
    checkpoint = open_checkpoint(store, save(store, state))
    plan = plan_load(checkpoint.stored(), [Shard(tensor=state[0].info, box=whole((4, 4)))])
    frozen = np.zeros((4, 4), np.uint32)
    frozen.flags.writeable = False
    for outputs in ([], [np.zeros((4, 5), np.uint32)], [np.zeros((4, 4), np.float32)], [frozen]):
        with pytest.raises(ShardInvalid):
            checkpoint.load(plan, outputs, threads=1)


def test_only_the_blocks_of_the_wanted_names_are_read(store, monkeypatch):
    monkeypatch.setattr(index_file, "WHOLE_BYTES", 0)
    state = [tensor(f"layer{n:04d}", "int32", np.arange(4, dtype=np.int32)) for n in range(2000)]
    ref = save(store, state)
    read_bytes = []
    get_range = store.get_range
    monkeypatch.setattr(store, "get_range", lambda key, start, n: read_bytes.append(n) or get_range(key, start, n))
    found = open_checkpoint(store, ref).stored(["layer0500", "layer1999", "not there"])
    assert sorted(found) == ["layer0500", "layer1999"]
    assert sum(read_bytes) < open_checkpoint(store, ref).manifest.writers[0].size / 2
    assert len(open_checkpoint(store, ref).stored()) == 2000


def test_reading_needs_no_torch():
    code = (
        "import sys, resilient.checkpoint.reader, resilient.checkpoint.writer, resilient.checkpoint.verify;"
        "import resilient.cli.ls, resilient.cli.inspect, resilient.cli.verify;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


# ---- damage, and objects that lie about each other with hashes that are right
def rewritten(store, ref, change):
    """A second manifest over the same objects: `change` makes it of the first. What an attacker could commit."""
    manifest = change(open_checkpoint(store, ref).manifest)
    data = encode_manifest(manifest)
    store.put(manifest.key, data)
    return Ref(key=manifest.key, hash=xxhash.xxh3_128_hexdigest(data), size=len(data))


def with_writer(manifest, **fields):
    return replace(manifest, writers=(replace(manifest.writers[0], **fields), *manifest.writers[1:]))


@pytest.mark.parametrize("field", ["tensors", "chunks", "values", "raw_bytes", "stored_bytes"])
def test_counts_in_the_manifest_must_be_those_of_the_index(store, field):
    ref = save(store, some_state(1))
    lying = rewritten(store, ref, lambda manifest: with_writer(manifest, **{field: 7}))
    with pytest.raises(CheckpointDamaged, match="the manifest says 7"):
        load(store, lying)
    assert any("the manifest says 7" in finding.what for finding in verify(store, lying))


def test_chunks_outside_of_their_part_are_refused(store):
    ref = save(store, some_state(1))
    part = open_checkpoint(store, ref).manifest.writers[0].parts[0]
    cut = rewritten(store, ref, lambda manifest: with_writer(manifest, parts=(replace(part, size=part.size - 1),)))
    with pytest.raises(CheckpointDamaged, match="outside of part 0"):
        load(store, cut)


def test_a_plan_for_another_checkpoint_is_refused(store):
    state = some_state(1)
    wide = open_checkpoint(store, save(store, state, writers=2))
    narrow = open_checkpoint(store, save(store, state, step=11))
    second_half = Box((48, 0), (48, 65))
    plan = plan_load(wide.stored(), [Shard(tensor=state[0].info, box=second_half)])
    with pytest.raises(CheckpointDamaged, match="no part 0 of 'n00001'"):
        narrow.load(plan, [np.empty(second_half.shape, np.uint32)], threads=1)


def two_writers(store, first, second, values=((), ())):
    """A checkpoint whose writers wrote these (tensor, box) lists."""
    refs = []
    for number, boxes in enumerate((first, second)):
        one = WriteJob(prefix=PREFIX, writer=f"n{number:05d}", snapshots=[snapshot(boxes)], values=values[number])
        refs.append(persist(store, one, threads=1))
    manifest = Manifest(
        prefix=PREFIX, step=10, generation=1, restore_step=None, layout={}, world_size=2, writers=tuple(refs)
    )
    return put_manifest(store, manifest)


W = tensor("w", "float32", trained(np.random.default_rng(0), (8, 8)))
X = tensor("w", "int32", np.zeros((8, 8), np.int32))
EIGHT = whole((8, 8))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([(W, EIGHT)], [(W, EIGHT)]),
        ([(W, EIGHT)], [(W, Box((3, 3), (1, 1)))]),
        ([(W, Box((0, 0), (5, 4)))], [(W, Box((4, 0), (2, 8)))]),
        ([(W, Box((0, 0), (8, 5)))], [(W, Box((0, 4), (8, 1)))]),
    ],
)
def test_chunks_that_overlap_are_refused(store, first, second):
    ref = two_writers(store, first, second)
    with pytest.raises(CheckpointDamaged, match="overlap"):
        open_checkpoint(store, ref).stored()
    assert "overlap" in str(verify(store, ref)[0])


def test_chunks_that_only_touch_are_not_an_overlap(store):
    ref = two_writers(store, [(W, Box((0, 0), (8, 3)))], [(W, Box((0, 3), (8, 5)))])
    assert same(load(store, ref)[0], [W])
    assert verify(store, ref, deep=True) == ()


def test_a_tensor_that_is_not_covered_is_found_by_verify_and_by_who_wants_it(store):
    ref = two_writers(store, [(W, Box((0, 0), (8, 3)))], [(W, Box((0, 4), (8, 4)))])
    (finding,) = verify(store, ref)
    assert "no chunk holds [0:8, 3:4] of 'w'" in str(finding)
    with pytest.raises(CheckpointDamaged, match="missing"):
        load(store, ref)
    (output,) = read(open_checkpoint(store, ref), [Shard(tensor=W.info, box=Box((0, 0), (8, 3)))])
    assert (output == W.bits[:, :3]).all()


def test_writers_that_describe_a_tensor_differently_are_refused(store):
    ref = two_writers(store, [(W, Box((0, 0), (4, 8)))], [(X, Box((4, 0), (4, 8)))])
    with pytest.raises(CheckpointDamaged, match="for another writer"):
        open_checkpoint(store, ref).stored()


def test_a_value_with_two_writers_is_refused(store):
    ref = two_writers(store, [], [], values=([("v", None, b"1")], [("v", None, b"1")]))
    with pytest.raises(CheckpointDamaged, match="two writers"):
        open_checkpoint(store, ref).values()


@pytest.mark.parametrize("size", [5, 65 << 20])
def test_a_manifest_of_the_wrong_size_is_damaged(store, size):
    ref = save(store, some_state(1))
    with pytest.raises(CheckpointDamaged) as caught:
        open_checkpoint(store, replace(ref, size=size))
    assert ref.key in caught.value.where
    assert caught.value.next


def test_a_newer_format_is_said_to_be_newer(store):
    key = f"{PREFIX}/manifest"
    data = b'{"format":"resilient-checkpoint","version":2}'
    store.put(key, data)
    ref = Ref(key=key, hash=xxhash.xxh3_128_hexdigest(data), size=len(data))
    with pytest.raises(FormatUnsupported, match="version 2"):
        open_checkpoint(store, ref)
    assert "version 2" in str(verify(store, ref)[0])


class Flipping(MemoryStore):
    """Reads of one key come back with one bit changed, at the same place each time."""

    def __init__(self, inner, key, at):
        super().__init__("flipping")
        self._objects = inner._objects
        self.flipped, self.at = key, at

    def get(self, key, *, max_bytes=None):
        return self._flip(key, 0, super().get(key, max_bytes=max_bytes))

    def get_range(self, key, start, length):
        return self._flip(key, start, super().get_range(key, start, length))

    def get_into(self, key, start, out):
        out[:] = self.get_range(key, start, out.nbytes)

    def _flip(self, key, start, data):
        if key != self.flipped or not start <= self.at < start + len(data):
            return data
        wrong = bytearray(data)
        wrong[self.at - start] ^= 4
        return bytes(wrong)


@pytest.mark.parametrize("codec", ["raw", "fast"])
def test_every_single_byte_is_vouched_for(store, codec, monkeypatch):
    monkeypatch.setattr(index_file, "WHOLE_BYTES", 0)
    state = [
        tensor("w", "float32", trained(np.random.default_rng(0), (10, 13))),
        tensor("b", "bool", np.zeros(9, bool)),
    ]
    ref = save(store, state, codec=codec, values={("v", 1): b"{}"})
    for item in store.list():
        for at in range(item.size):
            flipping = Flipping(store, item.key, at)
            with pytest.raises(CheckpointDamaged) as caught:
                load(flipping, ref, threads=1)
            assert item.key in caught.value.where


def test_damage_names_object_offset_and_both_hashes(store):
    ref = save(store, some_state(1))
    part = open_checkpoint(store, ref).manifest.writers[0].parts[0].key
    with pytest.raises(
        CheckpointDamaged, match=r"bytes at \d+\) hashes to [0-9a-f]{32} instead of [0-9a-f]{32}"
    ) as caught:
        load(Flipping(store, part, 5000), ref)
    assert caught.value.where.endswith(part)
    assert "older step" in caught.value.next


def test_nothing_unverified_reaches_an_output(store, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 4 << 10)
    state = [tensor("w", "float32", trained(np.random.default_rng(0), (64, 64)))]
    ref = save(store, state)
    for at in range(100, 12_000, 600):
        flipping = Flipping(store, f"{PREFIX}/n00000.00000", at)
        checkpoint = open_checkpoint(flipping, ref)
        output = np.zeros((64, 64), np.uint32)
        plan = plan_load(checkpoint.stored(), [Shard(tensor=state[0].info, box=whole((64, 64)))])
        with pytest.raises(CheckpointDamaged):
            checkpoint.load(plan, [output], threads=1)
        assert ((output == state[0].bits) | (output == 0)).all()
        assert (output == 0).any()


def test_a_raw_hash_that_differs_from_what_was_decoded_is_damage(store):
    """A stored form that is whole and decodes to something else: a wrong encoder, or a forged index."""
    state = [tensor("w", "float32", trained(np.random.default_rng(0), (64, 64)))]
    checkpoint = open_checkpoint(store, save(store, state))
    stored = checkpoint.stored()["w"]
    forged = replace(stored, chunks=(replace(stored.chunks[0], raw_hash=b"x" * 16),))
    plan = plan_load({"w": forged}, [Shard(tensor=state[0].info, box=whole((64, 64)))])
    output = np.zeros((64, 64), np.uint32)
    with pytest.raises(CheckpointDamaged, match="decoded, hashes to"):
        checkpoint.load(plan, [output], threads=1)
    assert not output.any()


def test_verify_finds_everything_at_once(store):
    ref = save(store, some_state(1), writers=3)
    keys = {item.key.rsplit("/", 1)[1]: item.key for item in store.list()}
    store.delete(keys["n00000.00000"])
    store.put(keys["n00001.00000"], store.get(keys["n00001.00000"])[:-5])
    store.delete(keys["n00002.index"])
    data = bytearray(store.get(keys["n00002.00000"]))
    findings = verify(store, ref, deep=True)
    assert {finding.where.rsplit("/", 1)[1] for finding in findings} == {"n00000.00000", "n00001.00000", "n00002.index"}
    data[100] ^= 1
    store.put(keys["n00002.00000"], bytes(data))
    assert verify(store, ref) == verify(store, ref, deep=True) == findings  # without its index it says nothing


def test_deep_finds_what_sizes_do_not_show(store):
    ref = save(store, some_state(1))
    key = open_checkpoint(store, ref).manifest.writers[0].parts[0].key
    data = bytearray(store.get(key))
    data[10] ^= 1
    data[-10] ^= 1
    store.put(key, bytes(data))
    done = []
    assert verify(store, ref) == ()
    assert len(verify(store, ref, deep=True, progress=done.append)) == 2
    assert sum(done) == open_checkpoint(store, ref).manifest.stored_bytes


def test_deep_decodes_values_too(store):
    ref = save(store, [], values={**VALUES, ("bad", 4): b"{not json"})
    (finding,) = verify(store, ref)
    assert "'bad' of rank 4" in finding.where


def test_a_store_that_does_not_answer_is_not_damage(store, monkeypatch):
    ref = save(store, some_state(1))

    def silent(*_, **__):
        raise StoreUnavailable("timed out")

    monkeypatch.setattr(store, "get_into", silent)
    for act in (lambda: load(store, ref), lambda: verify(store, ref, deep=True)):
        with pytest.raises(StoreUnavailable):
            act()


def test_parts_of_an_earlier_checkpoint_are_read_where_the_manifest_refers_to_them(store):
    first = save(store, some_state(1), step=9)
    other = open_checkpoint(store, first).manifest
    ref = save(store, some_state(1), step=10)
    own = f"{PREFIX}/n00000.00000"
    store.delete(own)
    shared = PartRef(key=other.writers[0].parts[0].key, size=other.writers[0].parts[0].size)
    refers = rewritten(
        store, ref, lambda manifest: replace(with_writer(manifest, parts=(shared,)), refers=(other.prefix,))
    )
    assert same(load(store, refers)[0], some_state(1))
    assert own not in open_checkpoint(store, refers).manifest.keys


def test_an_empty_checkpoint_is_a_checkpoint(store):
    ref = save(store, [], values={})
    assert load(store, ref) == ({}, {})
    assert verify(store, ref, deep=True) == ()


def test_element_types_are_bits():
    assert element_type("complex128") == np.dtype("V16")
    assert element_type("bfloat16") == np.uint16
    assert TensorInfo(name="x", dtype="complex128", shape=(2,)).nbytes == 32
