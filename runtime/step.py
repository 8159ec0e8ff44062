"""One optimizer step over the global batch, the same whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from resilient.world_view import MicroBatch
from runtime.mesh import Mesh
from runtime.parallel.precision import casting
from runtime.parallel.sync import accumulating


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step learned; tensors on the device, equal on all ranks."""

    loss: Tensor  # float64 scalar, nats per token over the global batch, before the update
    grad_norm: Tensor  # float32 scalar, over all parameters, before clipping


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The input of one forward pass."""

    samples: Tensor  # (B, T + 1) token ids
    weight: float  # of each sample: 1, or 0 for padding


def cut_passes(samples: Tensor, plan: Sequence[MicroBatch]) -> list[Pass]:
    """This rank's samples (n, T + 1) as micro-batches; a rank that has none left runs one of weight 0.

    Every rank gets the same number: ranks that ran different numbers would wait for each other for ever.
    """
    passes, start = [], 0
    for micro_batch in plan:
        part = samples[start : start + micro_batch.count]
        start += micro_batch.count
        padding = torch.zeros((1, samples.shape[1]), dtype=samples.dtype, device=samples.device)
        passes.append(Pass(samples=part, weight=1.0) if micro_batch.count else Pass(samples=padding, weight=0.0))
    return passes


def loss_sum(model: nn.Module, samples: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all tokens predicted; samples (B, T + 1)."""
    logits: Tensor = model(samples[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), samples[:, 1:].flatten(), reduction="sum")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    passes: Sequence[Pass],
    mesh: Mesh,
    *,
    global_tokens: int,
    clip_norm: float,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Gradients of the mean loss over `global_tokens`, clipped to `clip_norm` (0: not), one update. Collective."""
    # Data-parallel wrappers average gradients over the ranks; this makes it a sum again.
    scale = mesh.layout.data_ranks / global_tokens
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for index, one in enumerate(passes):
        with accumulating(model, last=index == len(passes) - 1):
            with casting(model, dtype, mesh.device):
                loss = loss_sum(model, one.samples) * one.weight
            (loss * scale).backward()
        total += loss.detach()
    grad_norm = clip_gradients(model, clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=mesh.sum(total) / global_tokens, grad_norm=grad_norm)


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `clip_norm` if it is larger (0: never)."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
