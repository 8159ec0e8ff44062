"""The `resilient` command: questions about a run's checkpoints, answered from its store alone."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from resilient.cli.address import UsageWrong
from resilient.errors import CheckpointDamaged, LogDamaged, NoCheckpoint
from storage.errors import KeyInvalid, ResilientError

GOOD, BAD, USAGE, UNKNOWN = 0, 1, 2, 3

COMMANDS = ("ls", "inspect", "verify")
"""Each is a module here with HELP, DESCRIPTION, add_arguments(parser) and run(arguments) -> exit code."""

_DESCRIPTION = """\
Look at the checkpoints of a run. URL is what the run was given: a path, or an address such as s3://bucket/run-42.
"""
_EPILOG = """\
examples:
  resilient ls /data/run-42                    what is there
  resilient inspect /data/run-42@1200          what step 1200 holds
  resilient verify --deep s3://bucket/run-42   whether the newest step is whole, bit for bit

exit status: 0 good, 1 bad news (damage, nothing there), 2 wrong usage, 3 unknown (the store does not answer)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. What it answers goes to stdout, errors to stderr."""
    arguments = _parser().parse_args(argv)
    try:
        module = importlib.import_module(f"{__name__}.{arguments.command}")
        status: int = module.run(arguments)
        sys.stdout.flush()
    except ResilientError as error:
        return _failed(error, as_json=arguments.json)
    except BrokenPipeError:
        # Who reads (head, a pager) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNKNOWN
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("RESILIENT_TRACEBACK"):
            raise
        next_step = "this is a defect: run again with RESILIENT_TRACEBACK=1 and report what it prints"
        return _failed(ResilientError(f"{type(error).__name__}: {error}", next=next_step), as_json=arguments.json)
    return status


def status_of(error: ResilientError) -> int:
    """The exit status that an error means."""
    if isinstance(error, (CheckpointDamaged, LogDamaged, NoCheckpoint)):
        return BAD
    return USAGE if isinstance(error, (KeyInvalid, UsageWrong)) else UNKNOWN


def _failed(error: ResilientError, *, as_json: bool) -> int:
    text = json.dumps(error.to_wire()) if as_json else f"resilient: {type(error).__name__}: {error}"
    print(text, file=sys.stderr)
    return status_of(error)


class _Parser(argparse.ArgumentParser):
    """Says what to do next, as every error here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message}. Next: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="resilient", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name, help=module.HELP, description=module.DESCRIPTION, epilog=module.EPILOG, formatter_class=raw
        )
        module.add_arguments(command)
    return parser
