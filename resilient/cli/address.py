"""The URL[@STEP] and the store options of a command line (pure, but for opening the store)."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from resilient.errors import NoCheckpoint
from resilient.log.run_log import RunLog
from resilient.log.view import Committed, LogView
from storage.errors import ResilientError
from storage.open import open_store, redact
from storage.store import Store

_STEP = re.compile(r"(?P<url>.+)@(?P<step>[0-9]{1,18}|newest)", re.DOTALL)

ADDRESS_HELP = """\
@STEP is a number after the last @; without it the newest step is meant. Other @ belong to the path; where the path
itself ends in @ and a number, add @newest or a step after it.
"""


class UsageWrong(ResilientError):
    """The command line cannot be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where a run is, and which of its steps is meant."""

    url: str
    step: int | None = None  # None: the newest


def parse(text: str) -> Address:
    """`URL[@STEP]` taken apart. STEP is digits, or the word newest, after the last @."""
    match = _STEP.fullmatch(text)
    if match is None:
        return Address(url=text)
    return Address(url=match["url"], step=None if match["step"] == "newest" else int(match["step"]))


def parse_options(items: Iterable[str]) -> dict[str, object]:
    """KEY=TEXT and KEY:=JSON pairs as fsspec's storage_options. Raises UsageWrong, which shows no value."""
    options: dict[str, object] = {}
    for number, item in enumerate(items, start=1):
        key, found, value = item.partition("=")
        if not found or not key.rstrip(":"):
            # What was typed may hold a secret, and stderr is often kept.
            raise UsageWrong(f"--storage-option number {number} is not KEY=VALUE", next="for example key=value")
        if not key.endswith(":"):
            options[key] = value
            continue
        try:
            options[key[:-1]] = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageWrong(
                f"the value of --storage-option {key[:-1]} is not JSON", next="write KEY=TEXT for plain text"
            ) from error
    return options


def add_arguments(parser: argparse.ArgumentParser, *, with_step: bool) -> None:
    """What every command that reads a store takes."""
    parser.add_argument("url", metavar="URL[@STEP]" if with_step else "URL", help="the run's store, as it was given")
    parser.add_argument("--json", action="store_true", help="answer in JSON, for scripts")
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="storage_options",
        help="given to fsspec, as in pandas' storage_options; KEY:=JSON for what is not text; may be repeated",
    )


def open_at(url: str, arguments: argparse.Namespace) -> tuple[Store, LogView]:
    """The store and what its log says. Raises ResilientError."""
    store = open_store(url, parse_options(arguments.storage_options))
    return store, RunLog(store, report=_quiet).read()


def find(view: LogView, address: Address) -> Committed:
    """The commit that is meant. Raises NoCheckpoint."""
    commit = view.newest if address.step is None else view.find(address.step)
    if commit is None:
        raise nothing_there(view, address)
    return commit


def nothing_there(view: LogView, address: Address) -> ResilientError:
    """The error for a step that is not there, saying which are."""
    url = redact(address.url)
    if not view.commits:
        said = "the log has no entries" if not view.next_slot else f"the log's {view.next_slot} entries commit nothing"
        hint = "check the address"
        if address.step is not None:
            hint += f"; if the path itself ends in @{address.step}, write it as {url}@{address.step}@newest"
        return NoCheckpoint(f"there is no committed step: {said}", where=url, next=hint)
    steps = [commit.step for commit in view.commits]
    near = sorted(sorted(steps, key=lambda step: abs(step - (address.step or 0)))[:5])
    return NoCheckpoint(
        f"step {address.step} is not committed", where=url, next=f"near it are {', '.join(map(str, near))}"
    )


def _quiet(_: str) -> None:
    """Damaged entries are part of the answer; each command says them its own way."""
