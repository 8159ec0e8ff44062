"""Live tensors as shards: where a local tensor lies in its global one, and its memory as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard, TensorInfo
from resilient.errors import StateInvalid

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Array = npt.NDArray[Any]
Ints = tuple[int, ...]
Boxes = dict[tuple[Ints, DeviceMesh, tuple[Placement, ...]], tuple[Ints, Ints]]
"""What is worked out once for DTensors of one global shape, mesh and placements."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTensor:
    """One shard of the state and the memory that holds it."""

    shard: Shard
    tensor: torch.Tensor  # shape shard.box.shape, any strides, any device; shares memory with the live state


def dtype_name(tensor: torch.Tensor) -> str:
    """The dtype as checkpoints write it, e.g. "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def local_tensor(name: str, tensor: torch.Tensor, boxes: Boxes | None = None) -> LocalTensor | None:
    """This rank's box of `tensor`; None if it holds nothing of it (an empty shard, or not in the DTensor's mesh).

    A plain tensor is whole on every rank that has it. `boxes` remembers those of equal DTensors.
    Raises StateInvalid for tensors whose memory is not simply their elements (sparse, quantized, meta, wrapper
    subclasses, DTensors with pending reductions), DtypeUnknown.
    """
    shape = tuple(tensor.shape)
    info = TensorInfo(name=name, dtype=dtype_name(tensor), shape=shape)
    start = tuple(0 for _ in shape)
    if not isinstance(tensor, DTensor):
        local = tensor.detach()
    else:
        if any(isinstance(placement, Partial) for placement in tensor.placements):
            raise StateInvalid(
                "a DTensor with a pending reduction (Partial) has no elements yet",
                where=name,
                next="redistribute it before it becomes state",
            )
        if tensor.device_mesh.get_coordinate() is None:
            return None
        box_shape, start = _box(shape, tensor, {} if boxes is None else boxes)
        with torch.no_grad():  # else an autograd node is made for each
            local = tensor.to_local().detach()
        if tuple(local.shape) != box_shape:
            raise StateInvalid(
                f"the local shape is {tuple(local.shape)}, but placements {tensor.placements} of shape {shape} "
                f"give {box_shape}",
                where=name,
            )
    _check_memory(name, local)
    if local.numel() == 0 and 0 not in shape:
        return None
    return LocalTensor(shard=Shard(tensor=info, box=Box(start, tuple(local.shape))), tensor=local)


def _box(shape: Ints, tensor: DTensor, boxes: Boxes) -> tuple[Ints, Ints]:
    """(local shape, global offset) of a DTensor on this rank."""
    key = (shape, tensor.device_mesh, tensor.placements)
    found = boxes.get(key)
    if found is None:
        # The one rule for all placements, strided and uneven shards included (private in torch, checked by tests).
        box_shape, start = compute_local_shape_and_global_offset(*key)
        found = boxes[key] = (tuple(box_shape), tuple(start))
    return found


def _check_memory(name: str, local: torch.Tensor) -> None:
    kind, wraps = "", bool(is_traceable_wrapper_subclass(local))
    if local.is_meta:
        kind = "on the meta device"
    elif local.layout is not torch.strided:
        kind = f"of layout {local.layout}"
    elif local.is_quantized:
        kind = "quantized"
    elif wraps:
        kind = f"a {type(local).__name__}, which wraps other tensors"
    if kind:
        raise StateInvalid(
            f"this tensor is {kind}: checkpoints hold plain strided tensors", where=name, next="save its parts instead"
        )


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where verified bytes are to be written."""

    arrays: Sequence[Array]  # C-contiguous, unsigned integers of the item size (V16 for complex128), box shapes
    finish: Callable[[], None]  # copies what could not be written in place


def as_outputs(wanted: Sequence[LocalTensor]) -> Outputs:
    """The memory of local tensors for a reader: in place for contiguous CPU tensors, else through a bounce buffer."""
    arrays: list[Array] = []
    bounced: list[tuple[torch.Tensor, torch.Tensor]] = []
    for item in wanted:
        tensor = item.tensor
        if not (
            tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        ):
            bounce = torch.empty(tensor.shape, dtype=tensor.dtype)
            bounced.append((tensor, bounce))
            tensor = bounce
        arrays.append(words(tensor))

    def finish() -> None:
        with torch.no_grad():
            for tensor, bounce in bounced:
                # Elements of an expanded tensor share memory, so each place is written once.
                once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
                tensor[once].copy_(bounce[once])

    return Outputs(arrays=arrays, finish=finish)


def words(tensor: torch.Tensor) -> Array:
    """A contiguous CPU tensor's memory as unsigned integers of its item size, V16 for complex128; same shape."""
    item = tensor.element_size()
    if item == 16:
        return tensor.numpy().view(np.dtype("V16"))
    return tensor.view(_WORDS[item]).numpy().view(np.dtype(f"u{item}"))
