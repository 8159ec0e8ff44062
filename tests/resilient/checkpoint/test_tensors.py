"""Tensors of every dtype and stride come back to the bit, in place where their memory allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resilient.checkpoint.state import as_outputs, prepare
from tests.resilient.checkpoint.memory import bits, restore, save


@pytest.mark.parametrize(
    "dtype",
    ["float64", "bfloat16", "float8_e4m3fn", "complex64", "complex128", "int64", "uint16", "bool", "int8", "float16"],
)
@pytest.mark.parametrize("strided", [False, True])
def test_every_dtype_and_stride_comes_back_to_the_bit(dtype, strided):
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 255, (6, 4 * kind.itemsize), dtype=torch.uint8)
    a, b = raw.view(kind), torch.zeros_like(raw).view(kind)
    if strided:
        a, b = a.t(), b.t()
    live = {"t": b, "scalar": a[0, 0].clone().zero_(), "empty": b[:0]}
    saved = {"t": a, "scalar": a[0, 0].clone(), "empty": a[:0]}
    assert bits(live) != bits(saved)
    restore(save(saved), live)
    assert bits(live) == bits(saved)


def test_contiguous_cpu_tensors_are_written_in_place_and_others_bounced():
    a, b = torch.zeros(2, 3), torch.zeros(3, 2).t()
    report = prepare({"a": a, "b": b}, *_infos({"a": a, "b": b}))
    outputs = as_outputs(report.wanted)
    for array in outputs.arrays:
        array[:] = np.array(1.0, np.float32).view(np.uint32)
    assert a.sum() == 6
    assert b.sum() == 0
    outputs.finish()
    assert b.sum() == 6


def _infos(state):
    memory = save(state)
    return memory.infos, memory.values
