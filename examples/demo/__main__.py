"""Train on real text, kill everything in the middle of a save, go on with 3 ranks and then 2, and prove the result.

    python -m examples.demo [--dir DIR] [--steps N] [--quick] [--json]

1. An undisturbed twin trains on 4 ranks (HSDP, 2 x 2).
2. The same run again; while a save is being written, every process of it gets SIGKILL.
3. It goes on with 3 ranks (FSDP), until one of them gets SIGTERM: all three stop after the same step, saved.
4. It goes on with 2 ranks to the end.

Then every claim is checked and printed. The exit status is 0 only if all of them hold.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.demo.history import last_step, read_session
from examples.demo.proof import Session, Verdict, judge
from examples.demo.ranks import Ranks, SessionFailed, start
from resilient.log.run_log import RunLog
from storage.open import open_store

CONFIG = str(Path(__file__).parents[1] / "tiny.toml")
LIMIT_S = 240.0
"""For one session: a machine that needs longer than this for it has another problem."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """How long the run is, and where it is disturbed."""

    steps: int
    every: int  # steps between saves
    killed_save: int  # which save is interrupted, from 1
    stop_at: int  # step after which SIGTERM is sent


FULL = Story(steps=60, every=10, killed_save=3, stop_at=40)
QUICK = Story(steps=12, every=3, killed_save=2, stop_at=7)


class Demo:
    """Runs the sessions of one story in a folder."""

    def __init__(self, directory: Path, story: Story, console: Console) -> None:
        self._directory, self._story, self._console = directory, story, console
        self._checkpoints = directory / "run" / "checkpoints"
        self._started: list[Ranks] = []

    def twin(self) -> Session:
        """The undisturbed run."""
        ranks = self._start("twin", 4, replicate=2, checkpoints=self._directory / "twin" / "checkpoints")
        with self._console.status("the twin trains on 4 ranks, undisturbed"):
            self._expect(ranks.wait(LIMIT_S), {0}, ranks)
        self._say("twin", "4 ranks (HSDP 2x2)", "undisturbed")
        return read_session(self._directory / "twin", 4)

    def killed(self) -> tuple[Session, int]:
        """4 ranks; SIGKILL for all while a save is being written. The session, and its newest committed step."""
        story = self._story
        # The keeper stops itself between the data and the index of a save: certainly in the middle of it.
        point = {"RESILIENT_FAILPOINTS": f"writer.index=stop@{story.killed_save}"}
        ranks = self._start("1", 4, replicate=2, environment=point)
        with self._console.status("4 ranks train; a save is about to be interrupted"):
            self._await(lambda: bool(ranks.stopped()), ranks)
            ranks.kill()
        acknowledged, half = self._committed(), story.killed_save * story.every
        half_written = list(self._checkpoints.glob(f"data/*/{half:012d}/**/*"))
        if not half_written or acknowledged >= half:
            raise SessionFailed(f"the kill did not hit the save of step {half}: {acknowledged} is committed")
        self._say("1", "4 ranks (HSDP 2x2)", f"SIGKILL to all while step {half} was being written")
        return read_session(self._directory / "1", 4), acknowledged

    def stopped(self) -> tuple[Session, int]:
        """3 ranks; SIGTERM for one of them: all stop after the same step, saved."""
        ranks = self._start("2", 3)
        with self._console.status("3 ranks go on from the newest committed step"):
            self._await(lambda: last_step(self._directory / "2") >= self._story.stop_at, ranks)
            ranks.processes[1].send_signal(signal.SIGTERM)
            self._expect(ranks.wait(LIMIT_S), {75}, ranks)
        self._say("2", "3 ranks (FSDP)", "SIGTERM to one: all saved and left with 75")
        return read_session(self._directory / "2", 3), self._committed()

    def finished(self) -> Session:
        """2 ranks to the end."""
        ranks = self._start("3", 2)
        with self._console.status("2 ranks go on to the end"):
            self._expect(ranks.wait(LIMIT_S), {0}, ranks)
        self._say("3", "2 ranks (FSDP)", "to the end")
        return read_session(self._directory / "3", 2)

    def _start(
        self,
        name: str,
        size: int,
        *,
        replicate: int = 1,
        checkpoints: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ranks:
        output = self._directory / name
        arguments = [
            CONFIG,
            f"layout.replicate={replicate}",
            f"layout.shard={size // replicate}",
            f"train.steps={self._story.steps}",
            f"checkpoint.every_steps={self._story.every}",
            f'checkpoint.url="{checkpoints or self._checkpoints}"',
            f'output.directory="{output}"',
            "output.digests=true",
            "output.progress=lines",
        ]
        self._started.append(start(size, arguments, output / "logs", environment))
        return self._started[-1]

    def end_all(self) -> None:
        """Leave no process behind, whatever happened."""
        for ranks in self._started:
            ranks.kill()

    def _committed(self) -> int:
        newest = RunLog(open_store(str(self._checkpoints))).read().newest
        return newest.step if newest else 0

    def _await(self, happened: Callable[[], bool], ranks: Ranks) -> None:
        until = time.monotonic() + LIMIT_S
        while not happened():
            ended = [process.poll() for process in ranks.processes if process.poll() is not None]
            if ended or time.monotonic() > until:
                ranks.kill()
                raise SessionFailed(f"the ranks ended ({ended}) or took too long\n{ranks.tail()}")
            time.sleep(0.005)  # the processes are not ours to be told of: looked at, not awaited

    def _expect(self, codes: list[int], wanted: set[int], ranks: Ranks) -> None:
        if set(codes) != wanted:
            raise SessionFailed(f"exit codes {codes}, expected {wanted}\n{ranks.tail()}")
        if ranks.living():
            raise SessionFailed(f"processes {ranks.living()} outlived their session")

    def _say(self, name: str, layout: str, what: str) -> None:
        self._console.print(f"[green]done[/]  session {name:<5} {layout:<20} {what}")


def show(sessions: list[Session], twin: Session, verdicts: list[Verdict], console: Console) -> None:
    """The tables."""
    table = Table(title="Sessions", title_justify="left")
    for column in ("session", "ranks", "restored step", "last completed step", "loss there", "the twin's"):
        table.add_column(column, justify="right")
    for number, session in enumerate(sessions, start=1):
        last = max(session.steps)
        ours, other = session.steps[last].loss, twin.steps[last].loss
        table.add_row(
            str(number), str(session.ranks), str(session.restored_step), str(last), f"{ours:.6f}", f"{other:.6f}"
        )
    console.print(table)
    table = Table(title="Proof", title_justify="left")
    for column in ("claim", "measured", "verdict"):
        table.add_column(column)
    for verdict in verdicts:
        table.add_row(verdict.claim, verdict.detail, "[green]valid" if verdict.valid else "[red]INVALID")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Tell the story; 0 if every claim holds, 1 if one does not or a session went another way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="replaced if there (default runs/demo)")
    parser.add_argument("--quick", action="store_true", help="a dozen steps instead of sixty")
    parser.add_argument("--json", action="store_true", help="the verdicts as one JSON line on stdout")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json, highlight=False)
    begun_s = time.monotonic()
    story = QUICK if options.quick else FULL
    shutil.rmtree(options.dir, ignore_errors=True)
    demo = Demo(options.dir, story, console)
    try:
        twin = demo.twin()
        first, acknowledged = demo.killed()
        second, stopped_at = demo.stopped()
        sessions = [first, second, demo.finished()]
    except SessionFailed as failure:
        console.print(f"[red]failed[/]  {failure}", markup=True)
        return 1
    finally:
        demo.end_all()
    verdicts = judge(sessions, twin, acknowledged=[acknowledged, stopped_at], total=story.steps)
    show(sessions, twin, verdicts, console)
    good = all(verdict.valid for verdict in verdicts)
    console.print(
        f"loss {twin.steps[1].loss:.3f} -> {sessions[-1].steps[story.steps].loss:.3f} in {story.steps} steps; "
        f"{time.monotonic() - begun_s:.0f} s in all; look around with: resilient ls {options.dir}/run/checkpoints"
    )
    if options.json:
        sys.stdout.write(json.dumps({"valid": good, "verdicts": [asdict(verdict) for verdict in verdicts]}) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
