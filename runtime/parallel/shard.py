"""Sharded data parallelism: FSDP2 along `shard`, and copies of it along `replicate` (HSDP)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.errors import LayoutInvalid
from runtime.mesh import Mesh


def shard_model(
    model: nn.Module, units: Iterable[nn.Module], mesh: Mesh, *, dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    """Shard `model` in place; each unit is gathered and freed on its own, what is left with the root.

    Works on a model without memory (meta device). Weights, gradients' sums and the optimizer stay float32.
    """
    if mesh.axes is None:
        raise LayoutInvalid(f"{mesh.layout} needs a process group", next="start the ranks with torchrun")
    axes = mesh.axes["replicate", "shard"] if mesh.layout.replicate > 1 else mesh.axes["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
    )
    for unit in units:
        fully_shard(unit, mesh=axes, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=axes, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def gather_for_good(model: nn.Module) -> None:
    """Let the next forward pass gather every parameter and keep it, so that later passes need no peers.

    For drawing text with a model that fits on one device; training must not go on after it.
    """
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(False, recurse=True)
