"""Starting ranks of `python -m runtime` as a launcher would, and killing every process of theirs."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "RESILIENT_DEMO"
"""Every process of a session inherits this variable: so all of them are found, and only they are killed."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of one session."""

    processes: tuple[subprocess.Popen[bytes], ...]
    mark: str
    logs: tuple[Path, ...]

    def living(self) -> list[int]:
        """Process ids of the session that still exist, whoever their parent is now."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # ended while we looked, or not ours to read
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def stopped(self) -> list[int]:
        """Those of them that are stopped (state T)."""
        return [pid for pid in self.living() if _state(pid) == "T"]

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(30)

    def wait(self, timeout_s: float) -> list[int]:
        """Exit codes of the ranks. Raises SessionFailed when they take longer."""
        until = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise SessionFailed(f"the session did not end within {timeout_s:g} s\n{self.tail()}") from error

    def tail(self) -> str:
        """The end of what rank 0 printed."""
        return "\n".join(self.logs[0].read_text(errors="replace").splitlines()[-30:])


class SessionFailed(Exception):
    """The ranks did not do what the demonstration waits for."""


def start(size: int, arguments: Sequence[str], logs: Path, environment: Mapping[str, str] | None = None) -> Ranks:
    """Start `size` ranks of `python -m runtime` with these arguments; their output goes to files in `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(8)
    shared = {
        **os.environ,
        **(environment or {}),
        MARK: mark,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    processes, paths = [], []
    for rank in range(size):
        path = logs / f"rank-{rank}.log"
        with open(path, "ab") as file:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "runtime", *arguments],
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        paths.append(path)
    return Ranks(processes=tuple(processes), mark=mark, logs=tuple(paths))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
