"""Loops under `resilient.context` for tests; each function runs in the ranks of a world."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

import resilient
from tests.resilient.training import digest, digests, join, make_state, tokens_of, train_step
from tests.template import Rank


def rng_digest() -> str:
    """What the next random numbers will be, without drawing them."""
    return torch.random.get_rng_state().numpy().tobytes().hex()[-64:]


def train(
    rank: Rank,
    *,
    url: str,
    layout: str,
    total: int,
    every: int = 2,
    fail_at: int | None = None,
    break_at: int | None = None,
    stop_at: int | None = None,
    sigterm_at: int | None = None,
    victim: int = 0,
    on_preempt: str = "raise",
    seed: int = 1,
) -> dict[str, Any]:
    """Train, be disturbed as told, and say what the state is at the end."""
    join(rank)
    state = make_state(layout, seed=seed)
    torch.manual_seed(100 + rank.rank)
    losses = {}
    with resilient.context(url, state=state, every=resilient.Every(steps=every), on_preempt=on_preempt) as run:
        began = run.step
        for step in run.steps(total):
            losses[step] = train_step(state, tokens_of(step, rank.rank))
            run.report(loss=losses[step])
            if step == fail_at:
                message = "told to"
                raise ZeroDivisionError(message)
            if step == break_at:
                break
            if step == stop_at and rank.rank == victim:
                run.stop()
            if step == sigterm_at and rank.rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)
        stopping, ended = run.stopping, run.step
    return {
        "began": began,
        "ended": ended,
        "stopping": stopping,
        "losses": {str(step): loss.hex() for step, loss in losses.items()},
        "digests": digests(state),
        "rng": rng_digest(),
    }


class Tokens(torch.utils.data.Dataset[torch.Tensor]):
    """Sequences that depend on their index only."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> torch.Tensor:
        return tokens_of(index)[0]


def train_from_loader(
    rank: Rank, *, url: str, layout: str, total: int, workers: int, stop_at: int | None = None, counted: bool = True
) -> dict[str, Any]:
    """As `train`, with batches out of a DataLoader whose order is a Sampler's."""
    join(rank)
    state = make_state(layout, seed=1)
    sampler = resilient.Sampler(50, global_batch=4, seed=7)
    loader = sampler.loader(Tokens(), num_workers=workers)
    torch.manual_seed(100 + rank.rank)
    seen = []
    with resilient.context(url, state={**state, "data": sampler}, every=resilient.Every(steps=2)) as run:
        began = run.step
        batches = sampler.batches(loader) if counted else iter(loader)
        for step in run.steps(total):
            tokens = next(batches)
            train_step(state, tokens)
            seen.append(digest(tokens))
            if step == stop_at and rank.rank == 0:
                run.stop()
    return {"began": began, "seen": seen, "digests": digests(state), "rng": rng_digest(), "consumed": sampler.consumed}


def acknowledge(rank: Rank, *, url: str, layout: str, total: int) -> int:
    """Save after every step, and tell the test of each step that was acknowledged."""
    join(rank)
    state = make_state(layout, seed=1)
    with resilient.Checkpointer(url, keep=resilient.Keep(last=2)) as checkpointer:
        begun = checkpointer.restore(state) or 0
        rank.emit({"restored": begun})
        for step in range(begun, total):
            train_step(state, tokens_of(step))
            what = digests(state)
            rank.emit({"saving": step + 1, "digests": what})
            pending = checkpointer.save(step + 1, state)
            pending.result(30)
            rank.emit({"acknowledged": step + 1})
    return total


def restored(rank: Rank, *, url: str, layout: str) -> dict[str, Any]:
    """What the newest step holds."""
    join(rank)
    state = make_state(layout, seed=3)
    with resilient.Checkpointer(url) as checkpointer:
        step = checkpointer.restore(state)
    return {"step": step, "digests": digests(state)}
