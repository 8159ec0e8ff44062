"""A training run, from its configuration to the text that the model writes: read it top to bottom, copy it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

import resilient
from runtime.config import CheckpointConfig, Config
from runtime.data import load_text
from runtime.digest import DigestProbe
from runtime.evaluate import evaluate
from runtime.generate import write_text
from runtime.layout import fit_layout
from runtime.mesh import Mesh, build_mesh, choose_device, process_group
from runtime.meter import Meter
from runtime.models.llama import count_parameters
from runtime.optimizer import build_optimizer, build_scheduler
from runtime.parallel.build import build_model
from runtime.parallel.precision import compute_dtype
from runtime.step import cut_passes, train_step


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended; equal on all ranks, except `metrics`."""

    step: int  # completed
    restored_step: int | None  # where this process went on from
    loss: float | None  # of the last step, nats per token; None if there was none left to run
    val_loss: float | None
    checkpoints: str  # URL
    metrics: str  # path of this rank's lines
    seconds: float
    text: str


def train(config: Config, *, quiet: bool = False) -> Outcome:
    """Train as `config` says, going on from the newest checkpoint if there is one. Collective.

    Starts nothing: ranks are those that torchrun (or any launcher) started, or this process alone. With `quiet`,
    what is shown goes to stderr. Raises ConfigInvalid, LayoutInvalid, DataMissing, and what resilient.context raises.
    """
    device = choose_device(config.train.device)
    with process_group(device) as world:
        mesh = build_mesh(fit_layout(config.layout, world.size), device)
        meter = Meter(config.output, mesh, steps=config.train.steps, generation=world.generation, quiet=quiet)
        with meter:
            return _run(config, mesh, meter)


def _run(config: Config, mesh: Mesh, meter: Meter) -> Outcome:
    began_s = time.perf_counter()
    batch, place, dtype = config.train.global_batch, mesh.place, compute_dtype(config.parallel, mesh.device)
    torch.manual_seed(config.train.seed * 1_000_003 + mesh.rank)  # dropout: each rank draws its own

    share = place.share(batch)[1]  # samples of each batch that are this rank's; with none it gets one as padding

    text = load_text(config.data)
    model = build_model(config.model, config.parallel, mesh, config.train.seed)
    optimizer = build_optimizer(model, config.optimizer, mesh.device)
    scheduler = build_scheduler(optimizer, config.schedule, config.train.steps)
    sampler = resilient.Sampler(len(text.train), batch, config.train.seed, rank=place.rank, world=place.size)
    # A generator of its own: the loader would draw from torch's, and dropout would shift when a run goes on.
    workers = config.data.workers
    loader = DataLoader(text.train, batch_sampler=sampler, num_workers=workers, generator=torch.Generator())
    meter.console.print(
        f"{config.model.preset}: {count_parameters(config.model):,} parameters, {mesh.layout} on {mesh.device.type}"
        f" in {str(dtype).removeprefix('torch.')}, {len(text.train) * text.train.length / 1e6:.1f}M tokens of text"
    )

    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": sampler}
    probe = DigestProbe(model, optimizer)
    if config.output.digests:
        state["digests"] = probe

    with resilient.context(
        config.checkpoint_url,
        state=state,
        every=_cadence(config.checkpoint),
        keep=_retention(config.checkpoint),
        codec=config.checkpoint.codec,
    ) as run:
        first_step = run.step
        if first_step:
            meter.restored(first_step, saved=probe.saved, restored=probe.now() if config.output.digests else {})
        batches = sampler.batches(loader)
        meter.begin(first_step)
        for step in run.steps(config.train.steps):
            samples = next(batches)
            tokens = batch * text.train.length
            result = train_step(
                model,
                optimizer,
                cut_passes(samples["tokens"].to(mesh.device), place.micro_batches(batch, config.train.micro_batch)),
                mesh,
                global_tokens=tokens,
                clip_norm=config.optimizer.clip_norm,
                dtype=dtype,
            )
            lr = optimizer.param_groups[0]["lr"]
            scheduler.step()
            loss = meter.step(step, result, lr=lr, samples=samples["index"][:share].tolist(), tokens=tokens)
            run.report(loss=loss, tokens=tokens)
            if _evaluation_due(config, step):
                with run.phase("evaluate"):
                    val_loss = evaluate(model, text.validation, config.evaluate, mesh, dtype)
                meter.evaluated(step + 1, val_loss)
                run.report(val_loss=val_loss)

    written = write_text(model, config.output, mesh, window=config.data.sequence_length, seed=config.train.seed)
    return Outcome(
        step=run.step,
        restored_step=first_step or None,
        loss=meter.loss,
        val_loss=meter.val_loss,
        checkpoints=config.checkpoint_url,
        metrics=str(meter.path),
        seconds=time.perf_counter() - began_s,
        text=written if config.output.text_bytes else "",
    )


def _evaluation_due(config: Config, step: int) -> bool:
    if config.evaluate.samples == 0:
        return False
    every = config.evaluate.every_steps
    return step + 1 == config.train.steps or (every > 0 and (step + 1) % every == 0)


def _cadence(config: CheckpointConfig) -> resilient.Every | str:
    if config.every_minutes > 0:
        return resilient.Every(minutes=config.every_minutes)
    return resilient.Every(steps=config.every_steps) if config.every_steps > 0 else "auto"


def _retention(config: CheckpointConfig) -> resilient.Keep | None:
    if config.keep_last == 0:
        return None
    if config.keep_best == 0:
        return resilient.Keep(last=config.keep_last)
    return resilient.Keep(last=config.keep_last, best=config.keep_best, by="val_loss")
