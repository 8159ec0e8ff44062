"""Finding and killing the processes that carry a mark in their environment, and no others."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

RUN = "RESILIENT_DEMO"
"""Every process of a demonstration inherits this variable: so all of them are found, and only they are killed."""

SESSION = "RESILIENT_DEMO_SESSION"
"""Processes that a session's ranks start (the keeper) inherit this one too."""


def marked(variable: str, value: str) -> list[int]:
    """Process ids that carry the mark, whoever their parent is now; not this process, and no zombies."""
    wanted, found = f"{variable}={value}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended while we looked, or not ours to read
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def state(pid: int) -> str:
    """The state letter of a process (T: stopped, Z: zombie), empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def kill(pids: list[int]) -> None:
    """SIGKILL, which ends a stopped process as well; one that is gone is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_marked(variable: str, value: str, *, quiet_s: float = 0.5, deadline_s: float = 30.0) -> list[int]:
    """Kill what carries the mark until nothing was found for `quiet_s`. Returns what is still there after `deadline_s`.

    Looked for more than once: a process that is just being started has its environment only a moment later.
    """
    until = time.monotonic() + deadline_s
    quiet_since: float | None = None
    while time.monotonic() < until:
        found = marked(variable, value)
        kill(found)
        if found:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since >= quiet_s:
            return []
        time.sleep(0.02)  # they are not our children: looked at, not awaited
    return marked(variable, value)
