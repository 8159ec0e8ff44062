"""What ranks run in the tests of the runtime."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from runtime.config import Config
from runtime.data import Windows, load_text
from runtime.evaluate import evaluate
from runtime.layout import fit_layout
from runtime.mesh import Mesh, build_mesh, process_group
from runtime.optimizer import build_optimizer, build_scheduler
from runtime.parallel.build import build_model
from runtime.parallel.precision import compute_dtype
from runtime.settings import read_config
from runtime.step import StepResult, cut_passes, train_step
from tests.template import Rank

CPU = torch.device("cpu")


def a_config(overrides: list[str]) -> Config:
    return read_config(
        "[model]\npreset = 'test'\n[data]\nmax_megabytes = 0.5\nsequence_length = 32\nvalidation_percent = 20\n"
        "[train]\nglobal_batch = 8\nmicro_batch = 4\n[evaluate]\nsamples = 10\n[schedule]\nwarmup_steps = 2\n",
        overrides,
    )


def steps_of(config: Config, mesh: Mesh, text: Windows, model: nn.Module, steps: range) -> list[dict[str, float]]:
    """Losses and gradient norms of some steps, on samples that follow each other."""
    optimizer = build_optimizer(model, config.optimizer, CPU)
    scheduler = build_scheduler(optimizer, config.schedule, 100)
    lines = []
    for step in steps:
        result = one_step(config, mesh, text, model, optimizer, step)
        scheduler.step()
        lines.append({"loss": float(result.loss), "grad_norm": float(result.grad_norm)})
    return lines


def one_step(
    config: Config, mesh: Mesh, text: Windows, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> StepResult:
    batch = config.train.global_batch
    first, count = mesh.place.share(batch)
    samples = text.take(range(step * batch + first, step * batch + first + count))
    return train_step(
        model,
        optimizer,
        cut_passes(samples, mesh.place.micro_batches(batch, config.train.micro_batch)),
        mesh,
        global_tokens=batch * text.length,
        clip_norm=config.optimizer.clip_norm,
        dtype=compute_dtype(config.parallel, CPU),
    )


def train(rank: Rank | None, overrides: list[str], steps: int = 3) -> dict[str, Any]:
    """Trains a few steps; also the hash of the first weights and the loss on held-out text."""
    config = a_config(overrides)
    with process_group(CPU, timeout_s=30) as world:
        return _train(config, build_mesh(fit_layout(config.layout, world.size), CPU), steps)


def _train(config: Config, mesh: Mesh, steps: int) -> dict[str, Any]:
    text = load_text(config.data)
    model = build_model(config.model, config.parallel, mesh, config.train.seed)
    first = weights_hash(model)
    lines = steps_of(config, mesh, text.train, model, range(steps))
    held_out = evaluate(model, text.validation, config.evaluate, mesh, compute_dtype(config.parallel, CPU))
    return {"init": first, "steps": lines, "val_loss": held_out, "last": weights_hash(model)}


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(name.removeprefix("module.").encode() + whole.detach().numpy().tobytes())
    return digest.hexdigest()


def train_and_wrap_anew(rank: Rank, overrides: list[str], steps: int = 4) -> bool:
    """Whether weights are bit-identical when model and optimizer are made anew in mid-run, their state carried over."""
    config = a_config(overrides)
    with process_group(CPU, timeout_s=30) as world:
        mesh = build_mesh(fit_layout(config.layout, world.size), CPU)
        return len({_final_weights(config, mesh, steps, anew_at) for anew_at in (None, steps // 2)}) == 1


def _final_weights(config: Config, mesh: Mesh, steps: int, anew_at: int | None) -> str:
    text = load_text(config.data).train
    model = build_model(config.model, config.parallel, mesh, 0)
    optimizer = build_optimizer(model, config.optimizer, CPU)
    for step in range(steps):
        if step == anew_at:
            weights, state = model.state_dict(), optimizer.state_dict()
            model = build_model(config.model, config.parallel, mesh, 1)
            model.load_state_dict(weights)
            optimizer = build_optimizer(model, config.optimizer, CPU)
            optimizer.load_state_dict(state)
        one_step(config, mesh, text, model, optimizer, step)
    return weights_hash(model)
