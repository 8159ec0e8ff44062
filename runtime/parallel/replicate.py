"""Plain data parallelism: every rank holds the whole model, gradients are averaged (DDP)."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runtime.mesh import Mesh


def replicate_model(model: nn.Module, mesh: Mesh) -> nn.Module:
    """`model` wrapped, so that its gradients are averaged along `replicate` while backward runs."""
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(
        model,
        device_ids=[mesh.device] if mesh.device.type == "cuda" else None,
        process_group=mesh.group("replicate"),
        init_sync=False,  # every rank drew the same weights
        gradient_as_bucket_view=True,
        # Without this, DDP arranges its buckets anew after the first step, and with three or more ranks a sum
        # depends on its place in the bucket: a restored run would not be bit-identical to an undisturbed one.
        find_unused_parameters=True,
    )
