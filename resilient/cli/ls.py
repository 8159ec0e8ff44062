"""`resilient ls`: the committed steps of a run."""

from __future__ import annotations

import argparse

from rich.table import Table

from resilient.checkpoint.format import Manifest, number_json
from resilient.checkpoint.reader import open_checkpoint
from resilient.cli import BAD, GOOD, address, show
from resilient.errors import CheckpointDamaged, FormatUnsupported
from resilient.log.view import Committed
from storage.errors import ResilientError
from storage.store import Store

HELP = "list the committed steps"
DESCRIPTION = """\
List the committed steps of a run: when, how large, how much smaller than in memory, and the metrics handed over.
Reads the log and each step's manifest; no data.
"""
EPILOG = """\
examples:
  resilient ls /data/run-42
  resilient ls s3://bucket/run-42 --storage-option endpoint_url=http://127.0.0.1:9000
  resilient ls /data/run-42 --json | jq '.steps[-1].step'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    address.add_arguments(parser, with_step=False)


def run(arguments: argparse.Namespace) -> int:
    """List; BAD when nothing is there or something is damaged."""
    store, view = address.open_at(arguments.url, arguments)
    if not view.commits and not view.damaged:
        raise address.nothing_there(view, address.Address(url=arguments.url))
    steps = [_describe(store, commit) for commit in view.commits]
    if arguments.json:
        print(show.dump({"url": store.url, "steps": steps, "damaged_log_entries": list(view.damaged)}))
    else:
        _print(store.url, steps, view.damaged)
    return BAD if view.damaged or not steps or any(step["problem"] for step in steps) else GOOD


def _describe(store: Store, commit: Committed) -> dict[str, object]:
    problem: ResilientError | None = None
    manifest: Manifest | None = None
    tensors: int | None = None
    try:
        checkpoint = open_checkpoint(store, commit.manifest)
        manifest = checkpoint.manifest
        # A tensor sharded over nodes has a line with every writer: only all names together tell how many there are.
        tensors = manifest.writers[0].tensors if len(manifest.writers) == 1 else len(checkpoint.stored())
    except (CheckpointDamaged, FormatUnsupported) as error:
        problem = error
    return {
        "step": commit.step,
        "generation": commit.generation,
        "wall_ns": commit.entry.wall_ns,
        "tier": commit.entry.tier,
        "tensors": tensors,
        "raw_bytes": manifest.raw_bytes if manifest else None,
        "stored_bytes": manifest.stored_bytes if manifest else None,
        "ratio": show.ratio(manifest.raw_bytes, manifest.stored_bytes) if manifest else None,
        "world_size": manifest.world_size if manifest else None,
        "layout": dict(manifest.layout) if manifest else None,
        "metrics": {name: number_json(value) for name, value in commit.metrics.items()},
        "manifest": commit.manifest.key,
        "problem": str(problem) if problem else None,
    }


def _print(url: str, steps: list[dict[str, object]], damaged: tuple[int, ...]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("step", "generation", "ranks", "tensors", "in memory", "stored", "ratio"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("written", no_wrap=True)
    table.add_column("metrics")
    for step in steps:
        raw, stored, ratio, metrics = step["raw_bytes"], step["stored_bytes"], step["ratio"], step["metrics"]
        texts = "  ".join(f"{name}={value}" for name, value in metrics.items()) if isinstance(metrics, dict) else ""
        table.add_row(
            *(
                str(step[name]) if step[name] is not None else "?"
                for name in ("step", "generation", "world_size", "tensors")
            ),
            show.size(raw) if isinstance(raw, int) else "?",
            show.size(stored) if isinstance(stored, int) else "?",
            show.times(ratio if isinstance(ratio, float) else None),
            show.wall(step["wall_ns"]) if isinstance(step["wall_ns"], int) else "",
            show.plain(f"DAMAGED {step['problem']}", "red") if step["problem"] else show.plain(texts),
        )
    show.put(table)
    for slot in damaged:
        show.put(show.plain(f"log entry {slot} is damaged and was skipped", "red"))
    bad = sum(1 for step in steps if step["problem"])
    newest = f", newest {steps[-1]['step']}" if steps else ""
    verdict = f"{len(steps)} steps{newest}{f', {bad} damaged' if bad else ''}  {url}"
    show.put(show.plain(verdict, "red" if bad or damaged or not steps else "green"))
