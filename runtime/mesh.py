"""The mesh: this process among the ranks of a layout, passed as a value (no globals)."""

from __future__ import annotations

import datetime as dt
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from resilient.world_view import World, world
from runtime.errors import ConfigInvalid
from runtime.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A layout on real ranks."""

    layout: Layout
    device: torch.device
    rank: int = 0
    axes: DeviceMesh | None = None  # those of more than one rank, named; None: one process without a process group

    @property
    def place(self) -> World:
        """This rank among those that see different samples; its `micro_batches` shares out a batch."""
        return World(rank=self.rank, size=self.layout.data_ranks)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks along one axis; None if this one is alone there."""
        if self.axes is None or getattr(self.layout, axis) == 1:
            return None
        return self.axes.get_group(axis)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed in place over the ranks that see different samples. Collective."""
        for axis in ("shard", "replicate"):
            group = self.group(axis)
            if group is not None:
                dist.all_reduce(tensor, group=group)
        return tensor


def choose_device(wanted: str) -> torch.device:
    """cpu, or this process's own accelerator. Raises ConfigInvalid if it is wanted but missing."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigInvalid("train.device is 'cuda', but torch sees no CUDA device", next="use train.device=auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", world().local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(device: torch.device, *, timeout_s: float = 600.0) -> Iterator[World]:
    """Joins the ranks that a launcher started (RANK, WORLD_SIZE in the environment), and leaves them at the end.

    A plain process stays alone; a group that exists already is used as it is. NCCL carries tensors on
    an accelerator, gloo those in host memory. Models must be out of scope when this ends.
    """
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=dt.timedelta(seconds=timeout_s))
    yield world()
    # Not reached after an error: destroying can wait for peers that will never come, and the process ends anyway.
    if ours:
        # A model that outlives the group would take its last reference, and freeing that from Python can hang.
        gc.collect()
        dist.destroy_process_group()


def build_mesh(layout: Layout, device: torch.device) -> Mesh:
    """The mesh of `layout` over the initialised process group; ranks are numbered row by row over AXES. Collective."""
    if not dist.is_initialized():
        return Mesh(layout=layout, device=device)
    # Axes of one rank need no group of their own; creating them would only slow the start.
    sizes = {axis: size for axis, size in layout.sizes().items() if size > 1} or {"shard": 1}
    axes = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return Mesh(layout=layout, device=device, rank=dist.get_rank(), axes=axes)
