"""Worlds of ranks for tests: `world(n).run("package.module:function", ...)`, forked from one warm template.

    def test_ranks_agree(world):
        assert world(2).run("tests.resilient.test_world:sum_of_ranks", deadline_s=20) == [1, 1]

    def sum_of_ranks(rank, **arguments):      # `rank` is tests.template.Rank; the rest is JSON
        dist.init_process_group("gloo")       # RANK, WORLD_SIZE, MASTER_ADDR, ... are set
        ...
        return value                          # JSON; a list of all ranks' values is what `run` returns

`start` returns a Handle instead of waiting: events that ranks emit are awaited (no sleeping), ranks can be killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.processes import alive, descendants, kill_descendants, send
from tests.template import MESSAGE_BYTES_MAX, STACKS_SIGNAL

_LOG_TAIL_BYTES = 6000


class WorldFailed(AssertionError):
    """A rank failed, died or did not end in time; the message has the tracebacks or stacks of all ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended."""

    rank: int
    status: int | None  # exit code, or minus the signal that killed it; None while it runs
    result: Any  # None unless the function returned
    error: str | None  # traceback, if the function raised


class Template:
    """The warm process, started once per test session."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.template", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **quiet, "PYTHONPATH": str(root)},
            cwd=root,
            start_new_session=True,
        )
        theirs.close()
        self._control.settimeout(100)
        ready = json.loads(self._control.recv(MESSAGE_BYTES_MAX) or "null")
        if ready is None or ready["threads"] != 1:
            self.close()
            raise RuntimeError(f"the template must start, and with one thread: a fork of more can hang; {ready}")

    def start(self, request: dict[str, Any]) -> tuple[socket.socket, list[socket.socket]]:
        """Begin a run; returns the supervisor's socket and one socket per rank."""
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(request["size"] + 1)]
        socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno() for _, theirs in pairs])
        for _, theirs in pairs:
            theirs.close()
        return pairs[0][0], [ours for ours, _ in pairs[1:]]

    def close(self) -> None:
        """End the template and everything below it."""
        self._control.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            kill_descendants(self._process.pid)
            self._process.kill()
            self._process.wait(5)


class Handle:
    """A running world."""

    def __init__(self, template: Template, request: dict[str, Any]) -> None:
        self.size: int = request["size"]
        self.directory = Path(request["directory"])
        self._supervisor, self._channels = template.start(request)
        self._changed = threading.Condition()
        self._started: dict[str, Any] | None = None
        self._statuses: dict[int, int] = {}
        self._events: list[tuple[int, dict[str, Any]]] = []
        self._killed: set[int] = set()
        self._closing = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._await(lambda: self._started is not None, 20, "start")
        assert self._started is not None
        self.pids: list[int] = self._started["started"]
        self.store_pid: int = self._started["store"]
        self.supervisor_pid = self._parent_of(self.store_pid)

    # ---- events
    def event(self, deadline_s: float = 30.0, rank: int | None = None, **match: Any) -> dict[str, Any]:
        """The next event (after those taken) of this rank, or any, whose items include `match`; it is then taken.

        A rank that fails meanwhile (not one that the test killed) fails this call with its traceback.
        """
        found: list[int] = []

        def there() -> bool:
            found[:] = [
                i
                for i, (source, event) in enumerate(self._events)
                if rank in (None, source) and all(event.get(k) == v for k, v in match.items())
            ][:1]
            return bool(found)

        self._await(there, deadline_s, f"event {match} of rank {rank}", or_failed=True)
        with self._changed:
            return self._events.pop(found[0])[1]

    @property
    def events(self) -> list[tuple[int, dict[str, Any]]]:
        """(rank, event) seen so far and not taken, in order of arrival."""
        with self._changed:
            return list(self._events)

    def send(self, rank: int, message: Any) -> None:
        """Send a message that the rank reads with `rank.receive()`."""
        self._channels[rank].send(json.dumps(message).encode())

    # ---- violence
    def kill(self, rank: int, signum: int = signal.SIGKILL) -> None:
        """Signal one rank's process only."""
        if rank not in self._statuses:
            if signum == signal.SIGKILL:
                self._killed.add(rank)
            send(self.pids[rank], signum)

    def kill_ranks(self) -> None:
        """SIGKILL all ranks at once; what they started stays."""
        for pid in self.pids:
            send(pid, signal.SIGSTOP)  # none may react to another's death
        for rank in range(self.size):
            self.kill(rank)

    def kill_all(self) -> None:
        """SIGKILL everything of this world, as if the machine went: ranks, keepers, loaders, the store."""
        self._killed.update(range(self.size))
        for pid in descendants(self.supervisor_pid):
            send(pid, signal.SIGSTOP)
        kill_descendants(self.supervisor_pid)

    def others(self) -> list[int]:
        """Living processes of this world that are neither ranks nor the store (keepers, loader children)."""
        own = {*self.pids, self.store_pid}
        return [pid for pid in descendants(self.supervisor_pid) if pid not in own]

    # ---- ends
    def wait(self, deadline_s: float = 60.0) -> list[Any]:
        """Results of all ranks (None for one that the test killed). Raises WorldFailed if one fails or is late."""
        self._await(lambda: len(self._statuses) == self.size, deadline_s, "end of all ranks", or_failed=True)
        return [outcome.result for outcome in self.outcomes(0)]

    def outcomes(self, deadline_s: float = 60.0) -> list[Outcome]:
        """How each rank ended; failing or killed ranks are no error here, only the deadline is."""
        self._await(lambda: len(self._statuses) == self.size, deadline_s, "end of all ranks")
        return [self._outcome(rank) for rank in range(self.size)]

    def wait_exit(self, rank: int, deadline_s: float = 30.0) -> Outcome:
        """Wait for one rank's end."""
        self._await(lambda: rank in self._statuses, deadline_s, f"end of rank {rank}")
        return self._outcome(rank)

    def close(self) -> None:
        """End the world and everything it started; results stay readable."""
        if self._closing:
            return
        self._closing = True
        if alive(self.supervisor_pid):
            kill_descendants(self.supervisor_pid)
        self._supervisor.shutdown(socket.SHUT_RDWR)
        self._reader.join(10)
        for sock in (self._supervisor, *self._channels):
            sock.close()

    # ---- inside
    def _outcome(self, rank: int) -> Outcome:
        result, error = self._file(rank, "result"), self._file(rank, "error")
        return Outcome(
            rank=rank,
            status=self._statuses.get(rank),
            result=json.loads(result) if result else None,
            error=error.partition("\n")[2] if error else None,
        )

    def _file(self, rank: int, kind: str) -> str:
        path = self.directory / f"rank{rank}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""

    def _failed(self) -> list[int]:
        return [rank for rank, status in self._statuses.items() if status != 0 and rank not in self._killed]

    def _await(self, ready: Callable[[], bool], deadline_s: float, what: str, or_failed: bool = False) -> None:
        give_up = time.monotonic() + deadline_s
        with self._changed:
            self._changed.wait_for(lambda: ready() or (or_failed and bool(self._failed())), max(0.0, deadline_s))
            ended = len(self._statuses) == self.size
            if ready() and not (or_failed and ended and self._failed()):
                return
            failed = self._failed() if or_failed else []
        if failed:
            self._settle(min(2.0, max(0.0, give_up - time.monotonic())))
            headline = f"rank {min(failed, key=self._failure_order)} failed while the test awaited: {what}"
        else:
            headline = f"not within {deadline_s} s: {what}"
        report = self._report()
        self.close()
        raise WorldFailed(f"{headline}\n{report}")

    def _settle(self, seconds: float) -> None:
        """Let the other ranks fail by themselves: their own traceback says more than their stacks."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._statuses) == self.size, seconds)

    def _failure_order(self, rank: int) -> tuple[int, int]:
        first_line = self._file(rank, "error").partition("\n")[0]
        # A rank that died without a traceback is the likeliest cause: its peers' errors follow from it.
        return (1, int(first_line)) if first_line else (0, 0)

    def _report(self) -> str:
        hung = [rank for rank in range(self.size) if rank not in self._statuses]
        for rank in hung:
            if self._started:
                send(self._started["started"][rank], STACKS_SIGNAL)
        if hung:
            time.sleep(0.3)  # the only way to know that a frozen process will not answer
        parts = []
        for rank in sorted(range(self.size), key=lambda r: (r in hung, self._failure_order(r))):
            status = self._statuses.get(rank)
            text = self._file(rank, "error").partition("\n")[2]
            stacks = self._file(rank, "stacks")
            parts.append(
                f"---- rank {rank}: {'still running' if status is None else f'status {status}'}\n"
                + (text or (f"stacks:\n{stacks}" if rank in hung else ""))
                + f"output ({self.directory}/rank{rank}.log):\n{self._file(rank, 'log')[-_LOG_TAIL_BYTES:]}"
            )
        return "\n".join(parts)

    def _read(self) -> None:
        open_sockets = {self._supervisor.fileno(): self._supervisor, **{c.fileno(): c for c in self._channels}}
        while self._supervisor.fileno() in open_sockets:
            readable, _, _ = select.select(list(open_sockets), [], [])
            for fd in readable:
                message = b""
                with contextlib.suppress(ConnectionResetError):
                    message = open_sockets[fd].recv(MESSAGE_BYTES_MAX)
                if not message:
                    del open_sockets[fd]
                    continue
                self._take(json.loads(message))

    def _take(self, message: dict[str, Any]) -> None:
        with self._changed:
            if "started" in message:
                self._started = message
            elif "exit" in message:
                self._statuses[message["exit"]] = message["status"]
            else:
                self._events.append((message["rank"], message["event"]))
            self._changed.notify_all()

    @staticmethod
    def _parent_of(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class World:
    """`size` ranks, on nodes of `local_size` (default: one node)."""

    def __init__(
        self,
        template: Template,
        directory: Callable[[], Path],
        handles: list[Handle],
        size: int,
        local_size: int | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self._template, self._directory, self._handles = template, directory, handles
        self._shape = {"size": size, "local_size": local_size or size, "env": env or {}}

    def start(self, function: str, **arguments: Any) -> Handle:
        """Begin `package.module:function(rank, **arguments)` in every rank; closed when the test ends."""
        request = {"function": function, "arguments": arguments, "directory": str(self._directory()), **self._shape}
        handle = Handle(self._template, request)
        self._handles.append(handle)
        return handle

    def run(self, function: str, *, deadline_s: float = 60.0, **arguments: Any) -> list[Any]:
        """Run the function in every rank and return their results, by rank."""
        handle = self.start(function, **arguments)
        try:
            return handle.wait(deadline_s)
        finally:
            handle.close()
