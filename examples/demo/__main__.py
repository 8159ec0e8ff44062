"""Train on real text, kill everything in the middle of a save, go on with 3 ranks and then 2, and prove the result.

    python -m examples.demo                       a minute or two; into runs/demo
    python -m examples.demo --quick --dir /tmp/d  a smaller model, 16 steps
    python -m examples.demo --json                the verdicts as the last line of stdout, all else on stderr

twin  4 ranks (HSDP, 2 x 2) train undisturbed: what the rest is compared with.
1     The same run again; while a save is being written, every process of it gets SIGKILL.
2     3 ranks (FSDP) go on from the newest committed step, until one gets SIGTERM: all stop after the same step, saved.
3     2 ranks go on to the end.

Then it is checked that nothing acknowledged was lost, that every tensor came back bit for bit, that each step's loss
is the twin's, and that each sample was used exactly once.

Exit: 0 every claim holds, 1 one does not or a session went another way (then the log of the rank that failed first is
shown), 2 usage, 130 and 143 interrupted. In every case, SIGKILL included, no process of it is left running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from examples.demo.proof import judge
from examples.demo.ranks import LOG, SessionFailed, Template
from examples.demo.show import show_proof, show_sessions
from examples.demo.story import FULL, QUICK, Demo, Story


def main(arguments: list[str] | None = None) -> int:
    """Tell the story; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/demo"),
        help="a former demonstration there is replaced (default runs/demo)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="16 steps of a smaller model instead of 60 of examples/tiny.toml"
    )
    parser.add_argument("--json", action="store_true", help="the verdicts as one JSON line on stdout")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json, highlight=False)
    if options.dir.exists() and any(options.dir.iterdir()) and not (options.dir / LOG).exists():
        parser.error(f"{options.dir} holds something else than a former demonstration, which would be lost")
    signal.signal(signal.SIGTERM, _leave)
    shutil.rmtree(options.dir, ignore_errors=True)
    try:
        return _run(options.dir, QUICK if options.quick else FULL, console, as_json=options.json)
    except SessionFailed as failure:
        console.print(f"[red]failed[/]  {escape(str(failure))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; every process of the demonstration was ended")
        return 130


def _run(directory: Path, story: Story, console: Console, *, as_json: bool) -> int:
    begun_s = time.monotonic()
    with Template(directory) as template:
        demo = Demo(directory, story, template, console)
        twin = demo.twin()
        first, acknowledged = demo.killed()
        second, stopped_at = demo.stopped()
        sessions = [first, second, demo.finished()]
    verdicts = judge(sessions, twin, acknowledged=[acknowledged, stopped_at], total=story.steps)
    good = all(verdict.valid for verdict in verdicts)
    took_s, last = time.monotonic() - begun_s, sessions[-1].steps.get(story.steps)
    show_sessions(sessions, twin, demo.seconds, console)
    show_proof(verdicts, console)
    console.print(f"look around: resilient ls {escape(str(directory))}/run/checkpoints", soft_wrap=True)
    console.print(
        f"demo  {story.steps} steps on 4, 3, 2 ranks  loss {twin.steps[1].loss:.3f} -> "
        f"{last.loss if last else float('nan'):.3f}  {took_s:.0f} s  {'[green]valid' if good else '[red]INVALID'}",
        soft_wrap=True,
    )
    if as_json:
        outcome = {"valid": good, "seconds": demo.seconds, "verdicts": [asdict(verdict) for verdict in verdicts]}
        sys.stdout.write(json.dumps(outcome) + "\n")
    return 0 if good else 1


def _leave(signum: int, _: object) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
