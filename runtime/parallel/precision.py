"""The dtype of forward and backward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from runtime.config import ParallelConfig


def compute_dtype(config: ParallelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 or float32; "auto" is bfloat16 where an accelerator computes in it."""
    if config.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.precision]


def casting(model: nn.Module, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Context of a forward pass in `dtype`: a sharded model casts as it gathers, any other needs autocast."""
    if dtype == torch.float32 or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(device.type, dtype)
