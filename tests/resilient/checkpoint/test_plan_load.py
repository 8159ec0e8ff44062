"""The load plan: any layout into any other, each wanted element from one right place, in few reads."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.geometry import Box, split, whole
from resilient.checkpoint.items import Shard, TensorInfo
from resilient.checkpoint.plan_load import plan_load
from resilient.checkpoint.plan_save import plan_save
from resilient.checkpoint.stored import StoredTensor
from resilient.errors import CheckpointDamaged, StateMismatch
from tests.resilient.checkpoint.layouts import content, execute, infos, laid_out, record, write

INFO = TensorInfo(name="w", dtype="float32", shape=(8, 6))
layout_pairs = infos().flatmap(lambda t: st.tuples(st.just(t), laid_out(t), laid_out(t)))


def stored_as(*boxes, info=INFO):
    at, chunks = 0, []
    for box in boxes:
        chunks.append(record(box, box.size * 4, offset=at))
        at += box.size * 4
    return {info.name: StoredTensor(info=info, chunks=tuple(chunks))}


@settings(max_examples=150)
@given(layout_pairs, st.randoms(use_true_random=False), st.integers(1, 30), st.sampled_from([0, 8, 300]))
def test_any_layout_loads_into_any_other_bit_for_bit(case, seed, max_elements, max_gap):
    tensors, saved, live = case
    arrays = content(tensors, 0)
    stored, parts = write(plan_save(saved).shards, arrays, seed, max_elements=max_elements)
    for rank in live:
        plan = plan_load(stored, rank.shards, max_gap_bytes=max_gap, max_read_bytes=200)
        out, times = execute(plan, parts)
        for shard, array, count in zip(rank.shards, out, times, strict=True):
            assert (count == 1).all()
            assert array.tobytes() == np.ascontiguousarray(arrays[shard.tensor.name][shard.box.slices()]).tobytes()


@given(layout_pairs, st.randoms(use_true_random=False), st.sampled_from([0, 8, 100, 5000]), st.integers(1, 500))
def test_reads_are_bounded_and_hold_their_chunks(case, seed, max_gap, max_read):
    tensors, saved, live = case
    stored, _ = write(plan_save(saved).shards, content(tensors, 0), seed)
    plan = plan_load(stored, live[0].shards, max_gap_bytes=max_gap, max_read_bytes=max_read)
    seen = []
    for read in plan.reads:
        at = read.offset
        for use in read.uses:
            assert (use.chunk.writer, use.chunk.part) == (read.writer, read.part)
            assert 0 <= use.chunk.offset - at <= max_gap
            at = use.chunk.offset + use.chunk.stored_bytes
            seen.append(id(use.chunk))
        assert at == read.offset + read.nbytes
        assert read.nbytes <= max_read or len(read.uses) == 1
        useful = sum(use.chunk.stored_bytes for use in read.uses)
        assert read.nbytes - useful <= max(max_gap, useful)
    assert len(seen) == len(set(seen)), "a chunk is read twice"


def test_neighbouring_chunks_become_one_read_up_to_its_limit():
    info = TensorInfo(name="w", dtype="float32", shape=(1 << 22, 16))
    stored = stored_as(*split(whole(info.shape), 1 << 20), info=info)
    plan = plan_load(stored, [Shard(tensor=info, box=whole(info.shape))])
    assert [read.nbytes for read in plan.reads] == [32 << 20] * 8
    assert plan.read_bytes == plan.wanted_bytes == info.nbytes


def test_gaps_are_bridged_only_while_most_of_a_read_is_needed():
    """Ten small chunks, each a bridgeable gap apart: read as one, 90% of it would be for nothing."""
    info = TensorInfo(name="w", dtype="float32", shape=(100,))
    chunks = tuple(record(Box((i * 10,), (10,)), 40, offset=i * 400) for i in range(10))
    plan = plan_load({"w": StoredTensor(info=info, chunks=chunks)}, [Shard(tensor=info, box=Box((0,), (100,)))],
                     max_gap_bytes=400)  # fmt: skip
    assert [(len(read.uses), read.nbytes) for read in plan.reads] == [(2, 440)] * 5


def test_a_chunk_that_two_shards_want_is_read_once():
    stored = stored_as(whole(INFO.shape))
    wanted = [Shard(tensor=INFO, box=Box((0, 0), (3, 6))), Shard(tensor=INFO, box=Box((2, 1), (4, 2)))]
    (read,) = plan_load(stored, wanted).reads
    (use,) = read.uses
    assert [(copy.wanted, copy.src, copy.dst) for copy in use.copies] == [
        (0, Box((0, 0), (3, 6)), Box((0, 0), (3, 6))),
        (1, Box((2, 1), (4, 2)), Box((0, 0), (4, 2))),
    ]


def test_a_hole_in_the_stored_chunks_is_damage_named_by_its_place():
    stored = stored_as(Box((0, 0), (4, 6)), Box((4, 0), (4, 5)))
    assert plan_load(stored, [Shard(tensor=INFO, box=Box((0, 0), (8, 5)))]).reads
    with pytest.raises(CheckpointDamaged, match=r"no chunk holds \[4:8, 5:6\] of 'w' .*4 of the 48"):
        plan_load(stored, [Shard(tensor=INFO, box=whole(INFO.shape))])


def test_chunks_that_overlap_are_damage_even_where_the_sizes_add_up():
    whole_w = [Shard(tensor=INFO, box=whole(INFO.shape))]
    with pytest.raises(CheckpointDamaged, match="overlap: 54 elements"):
        plan_load(stored_as(Box((0, 0), (5, 6)), Box((4, 0), (4, 6))), whole_w)
    with pytest.raises(CheckpointDamaged, match="no chunk holds"):
        plan_load(stored_as(Box((0, 0), (4, 6)), Box((3, 0), (4, 6))), whole_w)


def test_a_chunk_stored_twice_is_damage():
    scalar = TensorInfo(name="s", dtype="float32", shape=())
    with pytest.raises(CheckpointDamaged, match="overlap: 2 elements"):
        plan_load(stored_as(Box((), ()), Box((), ()), info=scalar), [Shard(tensor=scalar, box=Box((), ()))])


@pytest.mark.parametrize(
    ("live", "message"),
    [
        (replace(INFO, name="v"), r"holds no tensor 'v' \(float32, shape \(8, 6\)\)"),
        (replace(INFO, shape=(8, 7)), r"shape \(8, 6\), the live tensor has \(8, 7\)"),
        (replace(INFO, shape=(48,)), r"shape \(8, 6\), the live tensor has \(48,\)"),
        (replace(INFO, dtype="bfloat16"), r"stored as float32, the live tensor is bfloat16"),
    ],
)
def test_a_live_tensor_that_does_not_fit_is_refused_with_both_descriptions(live, message):
    with pytest.raises(StateMismatch, match=message) as caught:
        plan_load(
            stored_as(whole(INFO.shape)), [Shard(tensor=live, box=Box((0,) * len(live.shape), (0,) * len(live.shape)))]
        )
    assert caught.value.next
    assert caught.value.where == live.name


def test_empty_boxes_read_nothing():
    stored = stored_as(whole(INFO.shape))
    assert plan_load(stored, [Shard(tensor=INFO, box=Box((8, 0), (0, 6)))]).reads == ()
    assert plan_load({}, []).reads == ()


def test_records_that_cannot_be_are_refused():
    with pytest.raises(CheckpointDamaged, match="raw bytes is not a part of"):
        StoredTensor(info=INFO, chunks=(record(Box((0, 0), (1, 6)), 23),))
    with pytest.raises(CheckpointDamaged, match="is not a part of"):
        StoredTensor(info=INFO, chunks=(record(Box((8, 0), (1, 6)), 24),))
    with pytest.raises(CheckpointDamaged, match="negative"):
        record(Box((0, 0), (1, 6)), 24, offset=-1)
    with pytest.raises(CheckpointDamaged, match="hashes"):
        replace(record(Box((0, 0), (1, 6)), 24), raw_hash=b"short")


@given(infos(max_tensors=1).flatmap(lambda t: st.tuples(st.just(t[0]), laid_out(t))), st.data())
def test_near_leaves_out_no_chunk_that_matters(case, data):
    info, ranks = case
    arrays = content([info], 0)
    stored, _ = write(plan_save(ranks).shards, arrays, random.Random(1), max_elements=data.draw(st.integers(1, 20)))
    tensor = stored[info.name]
    for rank in ranks:
        box = rank.shards[0].box
        near = tensor.near(box)
        assert all(chunk in near for chunk in tensor.chunks if chunk.box.overlap(box) is not None)
