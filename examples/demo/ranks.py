"""Starting the ranks of a session as a launcher would, awaiting them, and killing every process of theirs."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from examples.demo.marked import RUN, SESSION, kill, kill_marked, marked, state

LOG = "template.log"
"""Of the process that ranks are forked from; it is in the folder of every demonstration."""

START_LIMIT_S = 120.0
"""For importing torch, on a busy machine."""


class SessionFailed(Exception):
    """The ranks did not do what the demonstration waits for."""


class Ranks:
    """The processes of one session."""

    def __init__(self, template: Template, pids: Sequence[int], logs: Sequence[Path], mark: str) -> None:
        self.pids, self.logs, self._mark, self._template = tuple(pids), tuple(logs), mark, template

    def exits(self, wait_s: float = 0.0) -> dict[int, int]:
        """Exit code by rank, in the order in which they ended; -9 is SIGKILL. Waits at most `wait_s` for news."""
        ended = self._template.ended(wait_s)
        return {self.pids.index(pid): code for pid, code in ended.items() if pid in self.pids}

    def living(self) -> list[int]:
        """Process ids of the session that still exist: its ranks, and what they started."""
        ended = self._template.ended()
        return [pid for pid in self.pids if pid not in ended] + marked(SESSION, self._mark)

    def stopped(self) -> list[int]:
        """Those of the started ones that are stopped (state T)."""
        return [pid for pid in marked(SESSION, self._mark) if state(pid) == "T"]

    def signal(self, rank: int, signum: int) -> None:
        """Send a signal to one rank; one that has ended is no error."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signum)

    def kill(self) -> None:
        """SIGKILL to all of them at once. Raises SessionFailed if one survives that for 30 s."""
        until = time.monotonic() + 30
        while living := self.living():
            kill(living)
            if time.monotonic() > until:
                raise SessionFailed(f"processes {living} survive SIGKILL")
            self.exits(wait_s=0.02)

    def report(self, wanted: int | None = None) -> str:
        """The end of the log of the rank that ended first with another code than `wanted`; of rank 0 if none did."""
        exits = self.exits()
        rank, code = next(((rank, code) for rank, code in exits.items() if code != wanted), (0, None))
        lines = self.logs[rank].read_text(errors="replace").splitlines()[-30:]
        ended = "still runs" if code is None else f"ended first, {_explain(code)}"
        return "\n".join([f"rank {rank} {ended}; the end of {self.logs[rank]}:", *(f"  {line}" for line in lines)])


class Template:
    """The process that ranks are forked from; a context manager, after which nothing of the run is left."""

    def __init__(self, directory: Path) -> None:
        self._mark, self._log = secrets.token_hex(8), directory / LOG
        self._ended: dict[int, int] = {}  # exit code by process id, in order
        self._sessions, self._pending = 0, b""
        directory.mkdir(parents=True, exist_ok=True)
        # numpy would start threads, and a process with threads must not fork.
        environment = {**os.environ, RUN: self._mark, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "examples.demo.template"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # it must outlive a Ctrl-C, to clean up after it
            )

    def start(
        self, size: int, arguments: Sequence[str], logs: Path, environment: Mapping[str, str] | None = None
    ) -> Ranks:
        """Start `size` ranks of `python -m runtime` with these arguments; their output goes to files in `logs`.

        Raises SessionFailed if the template does not answer.
        """
        logs.mkdir(parents=True, exist_ok=True)
        self._sessions += 1
        mark = f"{self._mark}-{self._sessions}"
        shared = {
            **(environment or {}),
            SESSION: mark,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        paths = [logs / f"rank-{rank}.log" for rank in range(size)]
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        request = {"ranks": ranks, "arguments": list(arguments), "logs": [str(path.absolute()) for path in paths]}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._gone() from None
        until = time.monotonic() + START_LIMIT_S
        while time.monotonic() < until:
            for answer in self._answers(wait_s=1.0):
                if "pids" in answer:
                    return Ranks(self, answer["pids"], paths, mark)
        raise SessionFailed(f"no rank was started within {START_LIMIT_S:g} s; see {self._log}")

    def ended(self, wait_s: float = 0.0) -> dict[int, int]:
        """Exit codes by process id, of all sessions. Waits at most `wait_s` for news."""
        for _ in self._answers(wait_s):
            pass
        return self._ended

    def close(self) -> None:
        """End every process of the run. Raises SessionFailed if one survives."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # which tells it to kill all others
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if left := kill_marked(RUN, self._mark, quiet_s=0.0):
            raise SessionFailed(f"processes {left} survive SIGKILL")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever asks to stop a second time, while this cleans up, would leave what it cleans up.
        former = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.close()
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    def _answers(self, wait_s: float) -> list[dict[str, Any]]:
        """What the template has said since; exits are noted."""
        answers: list[dict[str, Any]] = []
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0.0 if answers else wait_s)[0]:
            received = self._process.stdout.read(1 << 16)
            if not received:
                raise self._gone()
            *lines, self._pending = (self._pending + received).split(b"\n")
            answers += [json.loads(line) for line in lines]
        self._ended |= {answer["pid"]: answer["code"] for answer in answers if "code" in answer}
        return answers

    def _gone(self) -> SessionFailed:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
        return SessionFailed(f"the process that ranks are forked from is gone; the end of {self._log}:\n{tail}")


def _explain(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
