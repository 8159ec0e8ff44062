"""`resilient verify`: whether a checkpoint is as it was written."""

from __future__ import annotations

import argparse
import os
import sys
import threading

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from resilient.checkpoint.reader import open_checkpoint
from resilient.checkpoint.verify import Finding, verify
from resilient.cli import BAD, GOOD, address, show
from resilient.errors import CheckpointDamaged, FormatUnsupported
from resilient.log.view import Committed
from storage.store import Store

HELP = "check that a checkpoint is whole"
DESCRIPTION = f"""\
Check one checkpoint: manifest and indexes against their hashes, every object there and of its size, every tensor
covered. With --deep every byte of data is read, compared with its hashes, and decoded. Names all that is damaged.

{address.ADDRESS_HELP}"""
EPILOG = """\
examples:
  resilient verify /data/run-42              the newest step, in moments
  resilient verify --deep /data/run-42@1200  every byte of step 1200
  resilient verify --all --deep s3://bucket/run-42
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of this command."""
    address.add_arguments(parser, with_step=True)
    parser.add_argument("--deep", action="store_true", help="read, compare and decode every byte")
    parser.add_argument("--all", action="store_true", help="every committed step, not only one")
    parser.add_argument(
        "--threads", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="that read and decode"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check; BAD when anything is damaged. Raises StoreError, when nothing can be said."""
    where = address.parse(arguments.url)
    store, view = address.open_at(where.url, arguments)
    log = [f"log entry {slot} is damaged" for slot in view.damaged]
    found = view.commits if arguments.all and view.commits else (address.find(view, where),)
    results = []
    for commit in found:
        findings = _verify(store, commit, deep=arguments.deep, threads=arguments.threads, quiet=arguments.json)
        results.append((commit, findings))
        if not arguments.json:
            _print(commit, findings, deep=arguments.deep)
    good = not log and not any(findings for _, findings in results)
    if arguments.json:
        print(show.dump(_json(store.url, results, view.damaged, deep=arguments.deep, good=good)))
    else:
        for line in log:
            show.put(show.plain(f"  {line}", "red"))
    return GOOD if good else BAD


def _verify(store: Store, commit: Committed, *, deep: bool, threads: int, quiet: bool) -> tuple[Finding, ...]:
    total = _stored_bytes(store, commit)
    if quiet or not deep or not sys.stderr.isatty():
        return verify(store, commit.manifest, deep=deep, threads=threads)
    columns = (TextColumn("step {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(str(commit.step), total=total)
        lock = threading.Lock()

        def progress(nbytes: int) -> None:
            with lock:
                bar.advance(task, nbytes)

        return verify(store, commit.manifest, deep=deep, threads=threads, progress=progress)


def _stored_bytes(store: Store, commit: Committed) -> int | None:
    try:
        return open_checkpoint(store, commit.manifest).manifest.stored_bytes
    except (CheckpointDamaged, FormatUnsupported):
        return None  # which is what `verify` will find


def _print(commit: Committed, findings: tuple[Finding, ...], *, deep: bool) -> None:
    for finding in findings:
        show.put(show.plain(f"  {finding.where}: {finding.what}", "red"))
    how = "every byte" if deep else "indexes and sizes (--deep reads every byte)"
    verdict = f"{len(findings)} damaged" if findings else "valid"
    show.put(show.plain(f"step {commit.step}  {how}  {verdict}", "red" if findings else "green"))


def _json(
    url: str,
    results: list[tuple[Committed, tuple[Finding, ...]]],
    damaged: tuple[int, ...],
    *,
    deep: bool,
    good: bool,
) -> dict[str, object]:
    return {
        "url": url,
        "deep": deep,
        "verdict": "valid" if good else "invalid",
        "damaged_log_entries": list(damaged),
        "steps": [
            {
                "step": commit.step,
                "generation": commit.generation,
                "verdict": "invalid" if findings else "valid",
                "findings": [{"where": finding.where, "what": finding.what} for finding in findings],
            }
            for commit, findings in results
        ],
    }
