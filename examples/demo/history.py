"""Reading what the ranks of a session left behind: their lines of metrics, as the values that are judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.demo.proof import Session, Step


def read_session(directory: Path, ranks: int) -> Session:
    """The session whose ranks wrote `metrics-<rank>.jsonl` into `directory`; a line cut by a kill is left out."""
    steps: dict[int, tuple[float, list[int]]] = {}
    complete: dict[int, int] = {}
    restored_step, saved, restored = 0, {}, {}
    for path in sorted(directory.glob("metrics-*.jsonl")):
        for line in _lines(path):
            if line["event"] == "step":
                loss, samples = steps.get(line["step"], (line["loss"], []))
                steps[line["step"]] = (loss, samples + line["samples"])
                complete[line["step"]] = complete.get(line["step"], 0) + 1
            elif line["event"] == "restored":
                restored_step, saved, restored = line["step"], line["saved"], line["restored"]
    return Session(
        ranks=ranks,
        restored_step=restored_step,
        steps={
            number: Step(number=number, loss=loss, samples=tuple(sorted(samples)))
            for number, (loss, samples) in steps.items()
            if complete[number] == ranks
        },
        saved=saved,
        restored=restored,
    )


def last_step(directory: Path) -> int:
    """The newest step that rank 0 has completed."""
    path = directory / "metrics-00000.jsonl"
    if not path.exists():
        return 0
    return next((line["step"] for line in _lines(path, newest_first=True) if line["event"] == "step"), 0)


def _lines(path: Path, *, newest_first: bool = False) -> Iterator[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    for text in reversed(lines) if newest_first else lines:
        if text.endswith("\n"):
            yield json.loads(text)
