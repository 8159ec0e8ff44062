"""The sessions of the demonstration, and where each is disturbed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from examples.demo.history import last_step, read_session
from examples.demo.proof import Session
from examples.demo.ranks import Ranks, SessionFailed, Template
from resilient.log.run_log import RunLog
from storage.open import open_store

CONFIG = Path(__file__).parents[1] / "tiny.toml"
LIMIT_S = 240.0
"""For one session: a machine that needs longer than this for it has another problem."""

PREEMPTED = 75
"""What a rank that was asked to stop, and saved, exits with."""


@dataclass(frozen=True, kw_only=True)
class Story:
    """How long the run is, and where it is disturbed."""

    steps: int
    every: int  # steps between saves
    killed_save: int  # which save is interrupted, from 1
    stop_at: int  # step after which SIGTERM is sent; a fast machine takes some more until it has arrived
    settings: tuple[str, ...] = ()  # of the run, beside those of examples/tiny.toml


FULL = Story(steps=60, every=10, killed_save=3, stop_at=40)

# A smaller model and batch, and little text to read: what is disturbed, restored and proved is the same. Five
# samples are no multiple of 4, 3 or 2 ranks.
QUICK = Story(
    steps=16,
    every=3,
    killed_save=2,
    stop_at=5,
    settings=(
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.intermediate_size=176",
        "data.sequence_length=64",
        "data.max_megabytes=1.0",
        "train.global_batch=5",
        "evaluate.samples=0",
    ),
)


class Demo:
    """Runs the sessions of one story in a folder."""

    def __init__(self, directory: Path, story: Story, template: Template, console: Console) -> None:
        self._directory, self._story, self._console = directory, story, console
        self._template, self._checkpoints = template, directory / "run" / "checkpoints"
        self.seconds: dict[str, float] = {}  # by session

    def twin(self) -> Session:
        """The undisturbed run."""
        with self._console.status("starting") as status:
            begun_s = time.monotonic()
            ranks = self._start("twin", 4, replicate=2, checkpoints=self._directory / "twin" / "checkpoints")
            self._finish(ranks, {0}, status, "twin", "4 ranks train, undisturbed")
        self._say("twin", "4 ranks, HSDP 2x2", "undisturbed", begun_s)
        return read_session(self._directory / "twin", 4)

    def killed(self) -> tuple[Session, int]:
        """4 ranks; SIGKILL for all while a save is being written. The session, and its newest committed step."""
        story, begun_s = self._story, time.monotonic()
        # The keeper stops itself between the data and the index of a save: certainly in the middle of it.
        point = {"RESILIENT_FAILPOINTS": f"writer.index=stop@{story.killed_save}"}
        ranks = self._start("1", 4, replicate=2, environment=point)
        with self._console.status("") as status:
            text = "4 ranks train the same again; a save is about to be interrupted"
            self._await(lambda: bool(ranks.stopped()), ranks, status, "1", text)
            ranks.kill()
        acknowledged, half = self._committed(), story.killed_save * story.every
        half_written = list(self._checkpoints.glob(f"data/*/{half:012d}/**/*"))
        if not half_written or acknowledged >= half:
            raise SessionFailed(f"the kill did not hit the save of step {half}: {acknowledged} is committed")
        self._say("1", "4 ranks, HSDP 2x2", f"SIGKILL to all while step {half} was saved", begun_s)
        return read_session(self._directory / "1", 4), acknowledged

    def stopped(self) -> tuple[Session, int]:
        """3 ranks; SIGTERM for one of them: all stop after the same step, saved."""
        begun_s = time.monotonic()
        ranks = self._start("2", 3)
        with self._console.status("") as status:
            text = "3 ranks go on from the newest committed step"
            self._await(self._is_time_to_stop, ranks, status, "2", text, look_every_s=0.01)
            ranks.signal(1, signal.SIGTERM)
            self._finish(ranks, {PREEMPTED}, status, "2", "one rank was asked to stop")
        self._say("2", "3 ranks, FSDP", "SIGTERM to one: all saved, exit code 75", begun_s)
        return read_session(self._directory / "2", 3), self._committed()

    def finished(self) -> Session:
        """2 ranks to the end."""
        begun_s = time.monotonic()
        ranks = self._start("3", 2)
        with self._console.status("") as status:
            self._finish(ranks, {0}, status, "3", "2 ranks go on to the end")
        self._say("3", "2 ranks, FSDP", "to the end", begun_s)
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
            str(CONFIG),
            *self._story.settings,
            # Four ranks seldom have a GPU each, and the proof wants float32 that adds up the same to 1e-6.
            "train.device=cpu",
            f"layout.replicate={replicate}",
            f"layout.shard={size // replicate}",
            f"train.steps={self._story.steps}",
            f"checkpoint.every_steps={self._story.every}",
            f'checkpoint.url="{checkpoints or self._checkpoints}"',
            f'output.directory="{output}"',
            "output.digests=true",
            "output.progress=lines",
            "output.text_bytes=0",
        ]
        return self._template.start(size, arguments, output / "logs", environment)

    def _await(
        self,
        happened: Callable[[], bool],
        ranks: Ranks,
        status: Status,
        name: str,
        text: str,
        *,
        look_every_s: float = 0.05,
    ) -> None:
        until = time.monotonic() + LIMIT_S
        while not happened():
            # What happens in files and in processes that are not ours is looked at; a rank that ends wakes us.
            if ranks.exits(wait_s=look_every_s):
                raise SessionFailed(f"session {name}: a rank ended too early; {ranks.report()}")
            if time.monotonic() > until:
                raise SessionFailed(f"session {name}: waited {LIMIT_S:g} s in vain; {ranks.report()}")
            self._show(status, name, text)

    def _finish(self, ranks: Ranks, wanted: set[int], status: Status, name: str, text: str) -> None:
        (code,) = wanted
        until = time.monotonic() + LIMIT_S
        while len(exits := ranks.exits(wait_s=0.2)) < len(ranks.pids):
            if set(exits.values()) - wanted:
                raise SessionFailed(f"session {name}: {ranks.report(code)}")
            if time.monotonic() > until:
                raise SessionFailed(f"session {name} did not end within {LIMIT_S:g} s; {ranks.report(code)}")
            self._show(status, name, text)
        if set(exits.values()) != wanted:
            raise SessionFailed(f"session {name}: exit codes {exits}, expected {code}; {ranks.report(code)}")
        if living := ranks.living():
            raise SessionFailed(f"session {name}: processes {living} outlived it")

    def _show(self, status: Status, name: str, text: str) -> None:
        step = last_step(self._directory / name)
        status.update(f"session {name}: {text}, " + (f"step {step}/{self._story.steps}" if step else "starting"))

    def _is_time_to_stop(self) -> bool:
        return last_step(self._directory / "2") >= self._story.stop_at

    def _committed(self) -> int:
        newest = RunLog(open_store(str(self._checkpoints))).read().newest
        return newest.step if newest else 0

    def _say(self, name: str, layout: str, what: str, begun_s: float) -> None:
        self.seconds[name] = time.monotonic() - begun_s
        self._console.print(
            f"[green]done[/]  {name:<4}  {layout:<17} {self.seconds[name]:6.1f} s  {what}", soft_wrap=True
        )
