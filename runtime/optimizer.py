"""AdamW over decay groups, its learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from runtime.config import OptimizerConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with two groups: matrices, which decay, then vectors (norms), which do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = config.implementation
    if kind == "auto":
        kind = "fused" if device.type == "cuda" else "foreach"
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=kind == "fused",
        foreach=kind == "foreach",
    )


def learning_rate(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    """The factor on the peak rate, by the number of completed steps (pure).

    Rises linearly to 1 over `warmup_steps`, falls to `floor` at the last step (or `decay_steps`), stays there.
    """
    last = max(config.decay_steps or steps, config.warmup_steps + 1)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.shape == "constant":
            return 1.0
        done = min(1.0, (step - config.warmup_steps) / max(1, last - 1 - config.warmup_steps))
        left = 1.0 - done if config.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return config.floor + (1.0 - config.floor) * left

    return factor


def build_scheduler(optimizer: torch.optim.Optimizer, config: ScheduleConfig, steps: int) -> LambdaLR:
    """`learning_rate` as torch knows it; its state is the number of steps, so a longer run can be asked for later."""
    return LambdaLR(optimizer, learning_rate(config, steps))
