"""When gradients travel: after the last of a step's micro-batches, as far as memory allows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def accumulating(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Context of one micro-batch's forward and backward passes.

    Copies exchange gradients in the last one only. Shards are reduced in each one: keeping whole gradients
    until the last would need the memory that sharding saves.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_is_last_backward(last)
    return nullcontext()
