"""The snapshot holds the state of one moment, whatever the loop does next."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard, TensorInfo
from resilient.checkpoint.snapshot import copy_into, layout_slots
from resilient.checkpoint.state import flatten
from resilient.checkpoint.tensors import words
from resilient.errors import ShardInvalid


def snapshot(flat, shards=None):
    slots, nbytes = layout_slots([item.shard for item in flat.tensors] if shards is None else shards)
    arena = bytearray(max(1, nbytes))
    copy_into(memoryview(arena), slots, flat.tensors)
    return arena, slots


def content(arena, slot):
    return bytes(arena[slot.offset : slot.offset + slot.shard.nbytes])


def test_no_later_change_reaches_the_snapshot_by_whatever_way_it_is_made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.BatchNorm1d(300), nn.Linear(300, 2))
    fused = torch.optim.AdamW(model[0].parameters(), lr=0.1, fused=True)
    foreach = torch.optim.AdamW([*model[1].parameters(), *model[2].parameters()], lr=0.1, foreach=True)
    state = {
        "model": model,
        "fused": fused,
        "foreach": foreach,
        "own": {"t": torch.zeros(5), "view": torch.ones(4, 4).t()},
    }

    def step():
        model(torch.randn(8, 64)).square().sum().backward()
        fused.step(), foreach.step()

    step()
    flat = flatten(state)
    expected = {item.shard.tensor.name: words(item.tensor.contiguous().clone()).tobytes() for item in flat.tensors}
    arena, slots = snapshot(flat)
    # Fused and foreach steps, .data, NumPy, in-place operations: version counters miss most of these.
    step()
    for item in flat.tensors:
        item.tensor.data.add_(1)
        item.tensor.numpy()[...] = 3
    state["own"]["t"].fill_(9)
    changed = {item.shard.tensor.name: words(item.tensor.contiguous()).tobytes() for item in flat.tensors}
    assert all(changed[name] != expected[name] for name in expected)
    assert {slot.shard.tensor.name: content(arena, slot) for slot in slots} == expected


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "bool", "complex128", "float8_e5m2"]),
    data=st.data(),
)
def test_a_slot_may_be_any_part_of_the_tensor_that_holds_it(shape, dtype, data):
    kind = getattr(torch, dtype)
    count = int(np.prod(shape, dtype=int)) * kind.itemsize
    tensor = torch.arange(count, dtype=torch.int64).to(torch.uint8).remainder(2 if dtype == "bool" else 251)
    tensor = tensor.view(kind).view(shape)
    if data.draw(st.booleans()) and tensor.dim() > 1:
        tensor = tensor.transpose(0, -1)
    box = []
    for n in tensor.shape:
        start = data.draw(st.integers(0, n - 1))
        box.append((start, data.draw(st.integers(1, n - start))))
    flat = flatten({"t": tensor})
    part = Shard(tensor=flat.tensors[0].shard.tensor, box=Box(tuple(s for s, _ in box), tuple(n for _, n in box)))
    arena, (slot,) = snapshot(flat, [part])
    expected = tensor[tuple(slice(s, s + n) for s, n in box)].contiguous().clone()
    assert content(arena, slot) == words(expected).tobytes()


def test_slots_are_aligned_and_do_not_overlap():
    def shard(n, name):
        return Shard(tensor=TensorInfo(name=name, dtype="uint8", shape=(n,)), box=Box((0,), (n,)))

    slots, nbytes = layout_slots([shard(3, "a"), shard(1 << 17, "b"), shard(0, "c"), shard(65, "d"), shard(1, "e")])
    ends = [slot.offset + slot.shard.nbytes for slot in slots]
    assert all(end <= after.offset for end, after in zip(ends, slots[1:], strict=False))
    assert nbytes == ends[-1]
    assert all(slot.offset % 64 == 0 for slot in slots)
    assert slots[1].offset % 4096 == 0


def test_a_slot_that_nothing_holds_or_that_does_not_fit_is_refused():
    flat = flatten({"t": torch.zeros(4)})
    (item,) = flat.tensors
    other = Shard(tensor=TensorInfo(name="t", dtype="float64", shape=(4,)), box=Box((0,), (4,)))
    with pytest.raises(ShardInvalid, match="no live tensor"):
        snapshot(flat, [other])
    slots, _ = layout_slots([item.shard])
    with pytest.raises(ShardInvalid, match="buffer of 8 bytes"):
        copy_into(memoryview(bytearray(8)), slots, flat.tensors)


def test_the_buffer_can_be_released_afterwards():
    flat = flatten({"t": torch.zeros(4)})
    slots, nbytes = layout_slots([item.shard for item in flat.tensors])
    arena = bytearray(nbytes)
    view = memoryview(arena)
    copy_into(view, slots, flat.tensors)
    view.release()
    arena.extend(b"x")  # fails while anything still exports the buffer
