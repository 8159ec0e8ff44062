"""The command `python -m runtime`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.config import Config
from runtime.models.presets import PRESETS
from runtime.settings import catalogue, describe_kind, read_config
from storage.errors import ResilientError

_USAGE = "usage: python -m runtime CONFIG.toml [section.key=value ...] [--json]"

_HELP = f"""{_USAGE}

Trains a language model on real text. Saves in the background, and goes on from the newest checkpoint when
started again: on the same ranks, fewer, more, or differently arranged ones.

  python -m runtime examples/tiny.toml                          one process
  python -m runtime examples/tiny.toml train.steps=200 output.directory=runs/longer
  torchrun --nproc-per-node 4 -m runtime examples/tiny.toml layout.replicate=2 layout.shard=2

  --json    the last line of stdout is the outcome (step, loss, val_loss, checkpoints, ...); all else goes to stderr
  --help    this text

Exit: 0 trained to the end, 75 stopped on request and saved (start the same command again), 1 failed, 2 usage.

Settings, with their defaults. An unknown one is refused, and the nearest name shown.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "--help" in words or "-h" in words:
        sys.stdout.write(help_text())
        return 0 if words else 2
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    try:
        config = _configuration(words)
    except ResilientError as error:
        return _refuse(str(error), 2)
    # Only now: torch takes seconds to import, and a mistyped setting should be told at once.
    from resilient.errors import Preempted
    from runtime.errors import ConfigInvalid, DataMissing, LayoutInvalid
    from runtime.meter import print_json
    from runtime.trainer import train

    try:
        outcome = train(config, quiet=as_json)
    except (ConfigInvalid, LayoutInvalid, DataMissing) as error:
        return _refuse(str(error), 2)
    except Preempted as stop:
        if _is_first_rank():
            sys.stderr.write(f"{stop}\n")
        raise
    except ResilientError as error:
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        return 1
    if _is_first_rank():
        if as_json:
            print_json(dataclasses.asdict(outcome))
        else:
            sys.stdout.write(
                f"{outcome.step} steps in {outcome.seconds:.1f} s; checkpoints at {outcome.checkpoints}, "
                f"metrics in {outcome.metrics}\n"
            )
            if outcome.text:
                sys.stdout.write(f"the model writes:\n{outcome.text}\n")
    return 0


def _configuration(words: Sequence[str]) -> Config:
    unknown = [word for word in words if word.startswith("-")]
    files = [word for word in words if "=" not in word and word not in unknown]
    overrides = [word for word in words if "=" in word and word not in unknown]
    if unknown or len(files) != 1:
        what = f"unknown option {unknown[0]!r}" if unknown else f"{len(files)} configuration files given, expected 1"
        raise ResilientError(what, next=_USAGE)
    try:
        text = Path(files[0]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ResilientError(f"cannot read the configuration: {error}", next=_USAGE) from error
    return read_config(text, overrides, source=files[0])


def help_text() -> str:
    """What `--help` prints: usage, examples, every setting with its default and meaning."""
    lines, section = [_HELP], ""
    for item in catalogue():
        if item.section != section:
            section = item.section
            lines.append(f"[{section}]")
        kind = f" ({describe_kind(item.kind)})" if "one of" in describe_kind(item.kind) else ""
        lines.append(f"  {item.name + '=' + _written(item.default):<42} {item.help}{kind}")
    lines.append(f"\nPresets of the model: {', '.join(PRESETS)}\n")
    return "\n".join(lines)


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _refuse(message: str, code: int) -> int:
    # Every rank makes the same mistake; one says it.
    if _is_first_rank():
        sys.stderr.write(f"error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
