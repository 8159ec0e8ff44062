"""A checkpoint in memory: what state.py flattens, copied, and put back through the same doors as a reader uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.state import Restoration, as_outputs, flatten, prepare
from resilient.checkpoint.tensors import words


@dataclasses.dataclass
class Memory:
    """What all ranks held at one moment."""

    infos: dict[str, TensorInfo] = dataclasses.field(default_factory=dict)
    pieces: dict[str, list[tuple[Box, np.ndarray]]] = dataclasses.field(default_factory=dict)
    values: dict[tuple[str, int | None], bytes] = dataclasses.field(default_factory=dict)

    def whole(self, name: str) -> np.ndarray:
        """A stored tensor's words; every element must have been saved, and replicas must agree."""
        info = self.infos[name]
        out = np.zeros(info.shape, _words(info))
        seen = np.zeros(info.shape, bool)
        for box, piece in self.pieces[name]:
            at = box.slices()
            assert not (seen[at] & (out[at] != piece)).any(), f"replicas of {name} differ"
            out[at], seen[at] = piece, True
        assert seen.all(), f"{name} is not covered"
        return out


def _words(info: TensorInfo) -> np.dtype[Any]:
    return np.dtype("V16") if info.item_bytes == 16 else np.dtype(f"u{info.item_bytes}")


def save(state: Mapping[str, object]) -> Memory:
    """Copy the state of this rank, and of all others if there is a process group. Collective then."""
    flat = flatten(state)
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = (
        [(t.shard.tensor, t.shard.box, words(t.tensor.cpu().contiguous().clone())) for t in flat.tensors],
        {(name, None): data for name, data in flat.values.items()},
        {(name, rank): data for name, data in flat.rank_values.items()},
    )
    everyone: list[Any] = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    out = Memory()
    for tensors, values, own in everyone:
        for info, box, piece in tensors:
            assert out.infos.setdefault(info.name, info) == info
            out.pieces.setdefault(info.name, []).append((box, piece))
        for key, data in values.items():
            assert out.values.setdefault(key, data) == data, f"ranks differ in {key}"
        out.values.update(own)
    return out


def restore(memory: Memory, state: Mapping[str, object], **options: Any) -> Restoration:
    """Restore as the checkpointer does: prepare, read into place, finish."""
    if dist.is_initialized():
        options.setdefault("rank", dist.get_rank())
    restoration = prepare(state, memory.infos, memory.values, **options)
    outputs = as_outputs(restoration.wanted)
    for item, array in zip(restoration.wanted, outputs.arrays, strict=True):
        assert array.flags.c_contiguous
        assert array.shape == item.shard.box.shape
        np.copyto(array, memory.whole(item.shard.tensor.name)[item.shard.box.slices()])
    outputs.finish()
    restoration.finish()
    return restoration


def bits(state: Mapping[str, object]) -> dict[str, bytes]:
    """Everything that a state holds, byte by byte, to compare two."""
    flat = flatten(state)
    out = {t.shard.tensor.name: words(t.tensor.cpu().contiguous().clone()).tobytes() for t in flat.tensors}
    return {**out, **{f"{name} (value)": data for name, data in {**flat.values, **flat.rank_values}.items()}}


def names(state: Mapping[str, object]) -> list[str]:
    """The names of a state's tensors, sorted."""
    return sorted(item.shard.tensor.name for item in flatten(state).tensors)


def scramble(module: torch.nn.Module) -> None:
    """Make every parameter and buffer of a module different from what it was."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(3)
