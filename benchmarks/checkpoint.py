"""What a save costs the loop, time to durable, and load, beside the machine's limits and torch's own DCP.

    python -m benchmarks.checkpoint [--gib 1.0] [--rounds 3] [--dir DIR] [--json]

One process, one state, one run: a model with AdamW state of the size asked for, its values drawn like trained
ones (weights normal, first moments normal, second moments squares). A step multiplies matrices on one thread and
then changes every tensor, as an optimizer would. For each system:

    stall     how long the call to save kept the loop
    slowed    how much longer the steps took until the save was durable, than steps without a save
    durable   from the call to save until it is on disk (fsync included)
    load      restoring into live tensors, from a cold and from a warm page cache

Ratios to the limits (memory copy, best raw durable write, cold raw read) compare between machines; seconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import resilient
from benchmarks import limits

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system's medians; the first save (which also allocates) on its own."""

    system: str
    first_stall_s: float
    stall_s: float
    slowed_s: float
    durable_s: float
    stored_bytes: int
    load_cold_s: float
    load_warm_s: float
    equal: bool  # every tensor came back bit for bit, as it was at the save


class Model(nn.Module):
    """Blocks of 64 MiB of weights; with AdamW's two moments, 192 MiB of state each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "up": nn.Linear(2048, 4096, bias=False),
                    "down": nn.Linear(4096, 2048, bias=False),
                    "norm": nn.LayerNorm(2048),
                }
            )
            for _ in range(blocks)
        )


def make_state(gib: float, seed: int = 0) -> dict[str, Any]:
    """A model and its optimizer of about `gib` GiB together, with values distributed as after training."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(max(1, round(gib * 1024 / 192)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            first = torch.empty_like(parameter).normal_(0.0, 1e-4, generator=generator)
            second = torch.empty_like(parameter).normal_(0.0, 1e-4, generator=generator).square_()
            optimizer.state[parameter] = {"step": torch.tensor(1000.0), "exp_avg": first, "exp_avg_sq": second}
    return {"model": model, "optimizer": optimizer}


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    """Every tensor of the state, in a fixed order."""
    slots = state["optimizer"].state
    parameters = list(state["model"].parameters())
    return [p.data for p in parameters] + [slots[p][name] for p in parameters for name in sorted(slots[p])]


class Loop:
    """The training loop that is kept waiting: compute on one core, then change the whole state."""

    def __init__(self, state: dict[str, Any], step_s: float) -> None:
        self._state = state
        self._matrix = torch.randn(512, 512)
        self._repeats = 1
        took = min(self._compute_s() for _ in range(5))
        self._repeats = max(1, round(step_s / took))

    def step_s(self) -> float:
        """Run one step; how long it took."""
        begun = time.perf_counter()
        self._compute_s()
        torch._foreach_mul_(tensors_of(self._state), 0.999)
        return time.perf_counter() - begun

    def _compute_s(self) -> float:
        begun = time.perf_counter()
        for _ in range(self._repeats):
            self._matrix @ self._matrix
        return time.perf_counter() - begun


@dataclass(frozen=True, kw_only=True)
class System:
    """How one system saves and loads: `save` returns "is it durable?" and "wait until it is"."""

    name: str
    save: Callable[[int], tuple[Callable[[], bool], Callable[[], None]]]
    load: Callable[[int], None]
    folder: Path
    close: Callable[[], None] = lambda: None


def ours(state: dict[str, Any], folder: Path, codec: str) -> System:
    """This project, with one of its codecs."""
    checkpointer = resilient.Checkpointer(folder, codec=codec)

    def save(step: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        pending = checkpointer.save(step, state)
        return pending.done, lambda: void(pending.result(600))

    return System(
        name=f"resilient, {codec}",
        save=save,
        load=lambda step: void(checkpointer.restore(state, step=step)),
        folder=folder,
        close=checkpointer.close,
    )


def dcp_sync(state: dict[str, Any], folder: Path) -> System:
    """torch.distributed.checkpoint.save, and fsync as it does by default."""

    def save(step: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        dcp.save(flat(state), storage_writer=dcp.FileSystemWriter(folder / str(step)), no_dist=True)
        return lambda: True, lambda: None

    return System(name="DCP save", save=save, load=lambda step: load_dcp(state, folder / str(step)), folder=folder)


def dcp_async(state: dict[str, Any], folder: Path) -> System:
    """torch.distributed.checkpoint.async_save, its default thread."""

    def save(step: int) -> tuple[Callable[[], bool], Callable[[], None]]:
        future: Any = dcp.async_save(flat(state), storage_writer=dcp.FileSystemWriter(folder / str(step)), no_dist=True)
        return future.done, lambda: void(future.result())

    return System(
        name="DCP async_save", save=save, load=lambda step: load_dcp(state, folder / str(step)), folder=folder
    )


def load_dcp(state: dict[str, Any], folder: Path) -> None:
    """Load in place, as ours does."""
    dcp.load(flat(state), storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def flat(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state as DCP takes it: a flat dict of live tensors."""
    return {str(index): tensor for index, tensor in enumerate(tensors_of(state))}


def void(_: object) -> None:
    """Drop a result."""


def measure(system: System, state: dict[str, Any], loop: Loop, rounds: int) -> Row:
    """Save `rounds` + 1 times while the loop runs, then load the last save cold and warm."""
    quiet = statistics.median(loop.step_s() for _ in range(7))
    stalls, slowed, durable = [], [], []
    expected: list[torch.Tensor] = []
    for step in range(rounds + 1):
        last = step == rounds
        if last:
            expected = [tensor.clone() for tensor in tensors_of(state)]
        begun = time.perf_counter()
        done, wait = system.save(step)
        stalls.append(time.perf_counter() - begun)
        extra = 0.0
        while not done():
            extra += loop.step_s() - quiet
        wait()
        durable.append(time.perf_counter() - begun)
        slowed.append(extra)
    stored = sum(path.stat().st_size for path in system.folder.rglob("*") if path.is_file()) // (rounds + 1)

    def load_s(*, cold: bool) -> float:
        if cold:
            limits.drop_cache(system.folder)
        begun = time.perf_counter()
        system.load(rounds)
        return time.perf_counter() - begun

    loop.step_s()
    cold = load_s(cold=True)
    warm = statistics.median(load_s(cold=False) for _ in range(3))
    equal = all(torch.equal(a, b) for a, b in zip(expected, tensors_of(state), strict=True))
    system.close()
    return Row(
        system=system.name,
        first_stall_s=stalls[0],
        stall_s=statistics.median(stalls[1:]),
        slowed_s=statistics.median(slowed[1:]),
        durable_s=statistics.median(durable[1:]),
        stored_bytes=stored,
        load_cold_s=cold,
        load_warm_s=warm,
        equal=equal,
    )


def run(gib: float, rounds: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """All systems on one state; the result that is printed."""
    state = make_state(gib)
    nbytes = sum(tensor.nbytes for tensor in tensors_of(state))
    makers: list[Callable[[Path], System]] = [
        lambda at: ours(state, at, "auto"),
        lambda at: ours(state, at, "raw"),
        lambda at: ours(state, at, "fast"),
        lambda at: dcp_sync(state, at),
        lambda at: dcp_async(state, at),
    ]
    task = progress.add_task("limits", total=len(makers) + 1)
    copy_s = limits.memcpy_s(nbytes)
    write_s, way = limits.raw_write_s(folder, nbytes)
    probe = folder / "probe"
    probe.write_bytes(os.urandom(1 << 20) * (nbytes >> 20))
    read_s = limits.cold_read_s(probe)
    probe.unlink()
    loop = Loop(state, step_s=0.15)
    rows = []
    for index, make in enumerate(makers):
        at = folder / str(index)
        at.mkdir()
        system = make(at)
        progress.update(task, advance=1, description=system.name)
        rows.append(measure(system, state, loop, rounds))
        shutil.rmtree(at)
    progress.update(task, advance=1)
    return {
        "state_bytes": nbytes,
        "tensors": len(tensors_of(state)),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "memcpy_s": copy_s,
        "raw_write_s": write_s,
        "raw_write_by": way,
        "cold_read_s": read_s,
        "rows": [asdict(row) for row in rows],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table: seconds, and ratios to the limits."""
    nbytes, copy_s = result["state_bytes"], result["memcpy_s"]
    write_s, read_s = result["raw_write_s"], result["cold_read_s"]
    table = Table(
        title=f"{nbytes / GIB:.2f} GiB in {result['tensors']} tensors; memory copy {copy_s:.3f} s, "
        f"raw durable write {write_s:.2f} s ({result['raw_write_by']}), cold read {read_s:.2f} s",
        title_justify="left",
    )
    headings = (
        "first stall s",
        "stall s",
        "x copy",
        "slowed s",
        "lost x copy",
        "durable s",
        "x write",
        "bytes",
        "cold s",
    )
    table.add_column("system")
    for name in (*headings, "x read", "warm s", "bits"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        lost = row["stall_s"] + row["slowed_s"]
        table.add_row(
            row["system"],
            f"{row['first_stall_s']:.3f}",
            f"{row['stall_s']:.3f}",
            f"{row['stall_s'] / copy_s:.2f}",
            f"{row['slowed_s']:.3f}",
            f"{lost / copy_s:.2f}",
            f"{row['durable_s']:.2f}",
            f"{row['durable_s'] / write_s:.2f}",
            f"{row['stored_bytes'] / nbytes:.3f}",
            f"{row['load_cold_s']:.2f}",
            f"{row['load_cold_s'] / read_s:.2f}",
            f"{row['load_warm_s']:.2f}",
            "same" if row["equal"] else "DIFFER",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print; 1 if any system gave back other bits than it was given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state (default 1.0)")
    parser.add_argument("--rounds", type=int, default=3, help="saves per system after the first (default 3)")
    parser.add_argument("--dir", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(dir=options.dir) as folder,
        Progress(console=Console(stderr=True), transient=True, disable=options.json or not sys.stderr.isatty()) as bar,
    ):
        result = run(options.gib, options.rounds, Path(folder), bar)
    if not options.json:
        show(result, Console(width=150))
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if all(row["equal"] for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
