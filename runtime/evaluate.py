"""Loss on held-out text."""

from __future__ import annotations

import torch
from torch import nn

from runtime.config import EvaluateConfig
from runtime.data import Windows
from runtime.mesh import Mesh
from runtime.parallel.precision import casting
from runtime.step import cut_passes, loss_sum


@torch.no_grad()
def evaluate(
    model: nn.Module, text: Windows, config: EvaluateConfig, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> float:
    """Nats per token over samples spread evenly through `text`, the same ones each time. Collective."""
    count = min(config.samples, len(text))
    place = mesh.place
    first, mine = place.share(count)
    chosen = [index * len(text) // count for index in range(first, first + mine)]
    samples = text.take(chosen).to(mesh.device)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    model.eval()
    try:
        for one in cut_passes(samples, place.micro_batches(count, config.micro_batch)):
            with casting(model, dtype, mesh.device):
                total += loss_sum(model, one.samples) * one.weight
    finally:
        model.train()
    return float(mesh.sum(total) / (count * text.length))
