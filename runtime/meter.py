"""What a step took and gave: a line of JSON per step and rank, a progress bar on rank 0."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from runtime.config import OutputConfig
from runtime.mesh import Mesh
from runtime.step import StepResult

_SMOOTHING = 0.9  # of the speeds shown on the bar and in the printed lines


class Meter:
    """Measures the steps of one process; a context manager around the loop.

    Metrics go to `<directory>/metrics-<rank>.jsonl`, appended, one write per line before the step counts as
    complete: every step that a checkpoint holds has its line in the file, even if the process is killed.
    """

    def __init__(self, config: OutputConfig, mesh: Mesh, *, steps: int, generation: int | None, quiet: bool) -> None:
        self._config, self._steps, self._mesh = config, steps, mesh
        self._facts = {"rank": mesh.rank, "ranks": mesh.layout.world_size, "layout": str(mesh.layout)}
        self._facts |= {"generation": generation, "session_ns": time.time_ns()}
        directory = Path(config.directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"metrics-{mesh.rank:05d}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        # With --json the answer alone goes to stdout.
        self.console = Console(stderr=quiet, quiet=mesh.rank != 0, highlight=False, soft_wrap=True)
        self._bar = self._make_bar(config.progress, mesh.rank)
        self._task = None if self._bar is None else self._bar.add_task("", total=steps, numbers="")
        self._last_s = time.perf_counter()
        self._speed: float | None = None  # steps per second, smoothed
        self.val_loss: float | None = None
        self.loss: float | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        os.close(self._file)

    def begin(self, step: int) -> None:
        """The loop is about to run `step`; time before this is start-up."""
        self._last_s = time.perf_counter()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def step(self, step: int, result: StepResult, *, lr: float, samples: Sequence[int], tokens: int) -> float:
        """Record step number `step` (from 0); returns its loss. Waits for the device.

        samples   dataset indices that this rank trained on in this step
        tokens    tokens predicted by all ranks together
        """
        loss, grad_norm = float(result.loss), float(result.grad_norm)
        now_s = time.perf_counter()
        taken_s, self._last_s = now_s - self._last_s, now_s
        self.loss = loss
        speed = 1 / taken_s
        self._speed = speed if self._speed is None else _SMOOTHING * self._speed + (1 - _SMOOTHING) * speed
        self._write(
            event="step",
            step=step + 1,  # completed, as a checkpoint counts
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=tokens,
            samples=list(samples),
            step_s=taken_s,
            tokens_per_s=tokens / taken_s,
        )
        self._show(step + 1, loss, tokens * self._speed)
        return loss

    def restored(self, step: int, *, saved: Mapping[str, str], restored: Mapping[str, str]) -> None:
        """Record that the run goes on from `step`; digests of tensors, by name, as saved and as they came back."""
        self.console.print(f"goes on from step {step}")
        self._write(event="restored", step=step, saved=dict(saved), restored=dict(restored))

    def evaluated(self, step: int, val_loss: float) -> None:
        """Record the loss on held-out text after `step` completed steps; its time is not the next step's."""
        now_s = time.perf_counter()
        self._write(event="evaluate", step=step, val_loss=val_loss, evaluate_s=now_s - self._last_s)
        self.val_loss, self._last_s = val_loss, now_s
        if self._bar is None and self._config.progress != "none":
            self.console.print(f"step {step:>6}/{self._steps}  val_loss {val_loss:.4f}")

    def _write(self, **values: object) -> None:
        line = {"v": 1, **values, **self._facts, "wall_ns": time.time_ns()}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def _show(self, completed: int, loss: float, tokens_per_s: float) -> None:
        numbers = f"loss {loss:.4f}" + (f"  val {self.val_loss:.4f}" if self.val_loss is not None else "")
        numbers += f"  {_short(tokens_per_s)} tokens/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=completed, numbers=numbers)
        elif self._config.progress != "none" and (completed % self._config.every_steps == 0 or completed == 1):
            left_s = (self._steps - completed) / (self._speed or 1.0)
            self.console.print(f"step {completed:>6}/{self._steps}  {numbers}  {_clock(left_s)} left")

    def _make_bar(self, wanted: str, rank: int) -> Progress | None:
        if rank != 0 or wanted in ("lines", "none"):
            return None
        if wanted == "auto" and not self.console.is_terminal:
            return None
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
        return Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self.console)


def print_json(values: dict[str, object]) -> None:
    """The answer of a command as the last line of stdout."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _short(number: float) -> str:
    for limit, divisor, unit in ((1e4, 1, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if number < limit:
            return f"{number / divisor:.0f}{unit}"
    return f"{number / 1e9:.0f}G"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
