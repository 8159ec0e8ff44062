"""Finding and ending the descendants of a process this test session started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and parent of a process; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    found = _stat(pid)
    return found is not None and found[0] not in "ZX"


def descendants(root: int) -> list[int]:
    """Living children of `root`, theirs, and so on; sessions and process groups make no difference."""
    children: dict[int, list[int]] = {}
    for name in (path.name for path in Path("/proc").iterdir()):
        if name.isdigit() and (found := _stat(int(name))) and found[0] not in "ZX":
            children.setdefault(found[1], []).append(int(name))
    out, todo = [], [root]
    while todo:
        for child in children.get(todo.pop(), ()):
            out.append(child)
            todo.append(child)
    return out


def send(pid: int, signum: int) -> None:
    """Send a signal; a process that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def kill_descendants(root: int, *, keep: frozenset[int] = frozenset(), deadline_s: float = 10.0) -> None:
    """SIGKILL everything below `root` but `keep`, until nothing is left.

    `root` must be a child subreaper, so that an orphan stays below it. Raises TimeoutError past the deadline.
    """
    give_up = time.monotonic() + deadline_s
    while found := [pid for pid in descendants(root) if pid not in keep]:
        for pid in found:
            send(pid, signal.SIGKILL)
        if time.monotonic() > give_up:
            raise TimeoutError(f"processes {found} below {root} survive SIGKILL for {deadline_s} s")
        time.sleep(0.005)
