"""`resilient inspect`: what one checkpoint holds."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Iterable
from typing import Any

from rich.table import Table
from rich.text import Text

from resilient.checkpoint.format import Manifest, number_json
from resilient.checkpoint.reader import Values, open_checkpoint
from resilient.checkpoint.stored import StoredTensor
from resilient.cli import GOOD, address, show
from resilient.log.view import Committed

HELP = "show what one checkpoint holds"
DESCRIPTION = f"""\
Show the tensors (shape, dtype, bytes in memory and stored, chunks) and plain values of one checkpoint.
Reads manifest and indexes; no data.

{address.ADDRESS_HELP}"""
EPILOG = """\
examples:
  resilient inspect /data/run-42                                  the newest step
  resilient inspect /data/run-42@1200 --pattern 'model/*.weight'  some tensors of step 1200
  resilient inspect /data/run-42 --json | jq '.tensors | length'
"""
_VALUE_CHARS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    address.add_arguments(parser, with_step=True)
    parser.add_argument(
        "--pattern", default="*", metavar="GLOB", help="only names that match; * goes over / and . (default: all)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Show it. Raises CheckpointDamaged, NoCheckpoint."""
    where = address.parse(arguments.url)
    store, view = address.open_at(where.url, arguments)
    commit = address.find(view, where)
    checkpoint = open_checkpoint(store, commit.manifest)
    stored = checkpoint.stored()
    tensors = [tensor for name, tensor in stored.items() if fnmatch.fnmatchcase(name, arguments.pattern)]
    values = {key: data for key, data in checkpoint.values().items() if fnmatch.fnmatchcase(key[0], arguments.pattern)}
    if arguments.json:
        print(show.dump(_json(store.url, commit, checkpoint.manifest, tensors, values)))
    else:
        _print(commit, checkpoint.manifest, tensors, values, total=len(stored))
    return GOOD


def _json(
    url: str, commit: Committed, manifest: Manifest, tensors: Iterable[StoredTensor], values: Values
) -> dict[str, object]:
    return {
        "url": url,
        "step": commit.step,
        "generation": commit.generation,
        "wall_ns": commit.entry.wall_ns,
        "torch": manifest.torch,
        "world_size": manifest.world_size,
        "layout": dict(manifest.layout),
        "metrics": {name: number_json(value) for name, value in commit.metrics.items()},
        "raw_bytes": manifest.raw_bytes,
        "stored_bytes": manifest.stored_bytes,
        "writers": [
            {"writer": ref.writer, "index": ref.key, "parts": len(ref.parts), "stored_bytes": ref.stored_bytes}
            for ref in manifest.writers
        ],
        "tensors": [
            {
                "name": tensor.info.name,
                "dtype": tensor.info.dtype,
                "shape": list(tensor.info.shape),
                "raw_bytes": _raw(tensor),
                "stored_bytes": _stored(tensor),
                "ratio": show.ratio(_raw(tensor), _stored(tensor)),
                "chunks": len(tensor.chunks),
                "codecs": sorted({chunk.codec for chunk in tensor.chunks}),
            }
            for tensor in tensors
        ],
        "values": [
            {"name": name, "rank": rank, "bytes": len(data), "encoded": data.decode("utf-8")}
            for (name, rank), data in values.items()
        ],
    }


def _raw(tensor: StoredTensor) -> int:
    return sum(chunk.raw_bytes for chunk in tensor.chunks)


def _stored(tensor: StoredTensor) -> int:
    return sum(chunk.stored_bytes for chunk in tensor.chunks)


def _print(commit: Committed, manifest: Manifest, tensors: list[StoredTensor], values: Values, *, total: int) -> None:
    layout = " ".join(f"{axis}={length}" for axis, length in manifest.layout.items())
    show.put(show.plain(f"step {commit.step}  generation {commit.generation}  {show.wall(commit.entry.wall_ns)}"))
    show.put(show.plain(f"{manifest.world_size} ranks {layout}  torch {manifest.torch or '?'}"))
    show.put(_tensor_table(tensors))
    if values:
        show.put(_value_table(values))
    raw, stored = sum(map(_raw, tensors)), sum(map(_stored, tensors))
    shown = f"{len(tensors)} of {total} tensors" if len(tensors) != total else f"{total} tensors"
    verdict = (
        f"{shown}, {len(values)} values, {show.size(raw)} in {show.size(stored)} {show.times(show.ratio(raw, stored))}"
    )
    show.put(show.plain(verdict, "green"))


def _tensor_table(tensors: list[StoredTensor]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    for title in ("shape", "in memory", "stored", "ratio", "chunks"):
        table.add_column(title, justify="right", no_wrap=True)
    open_groups: list[str] = []
    for tensor in tensors:
        *groups, leaf = tensor.info.name.split("/")
        common = 0
        while common < min(len(groups), len(open_groups)) and groups[common] == open_groups[common]:
            common += 1
        for depth in range(common, len(groups)):
            below = [t for t in tensors if t.info.name.split("/")[: depth + 1] == groups[: depth + 1]]
            table.add_row(_indented(groups[depth] + "/", depth, "bold"), "", "", *_amounts(below))
        open_groups = groups
        shape = "×".join(map(str, tensor.info.shape)) or "scalar"
        table.add_row(_indented(leaf, len(groups)), tensor.info.dtype, shape, *_amounts([tensor]))
    return table


def _amounts(tensors: list[StoredTensor]) -> list[str]:
    raw, stored = sum(map(_raw, tensors)), sum(map(_stored, tensors))
    chunks = sum(len(tensor.chunks) for tensor in tensors)
    return [show.size(raw), show.size(stored), show.times(show.ratio(raw, stored)), str(chunks)]


def _indented(text: str, depth: int, style: str = "") -> Text:
    return Text("  " * min(depth, 20)) + show.plain(text, style)


def _value_table(values: dict[Any, bytes]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("value", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("bytes", justify="right")
    table.add_column("encoded", no_wrap=True)
    for (name, rank), data in values.items():
        preview = show.safe(data[: 4 * _VALUE_CHARS].decode("utf-8", "replace"), _VALUE_CHARS)
        table.add_row(show.plain(name), "all" if rank is None else str(rank), str(len(data)), Text(preview))
    return table
