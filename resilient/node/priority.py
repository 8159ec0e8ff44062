"""Scheduling priority of the keeper's threads: low while nobody waits, normal when somebody does."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

LOW_NICE = 10  # beside busy ranks: at 19 a keeper hardly runs at all, at 0 it takes from the step


class Priority:
    """What priority encoding threads get."""

    def __init__(self) -> None:
        self._normal = os.getpriority(os.PRIO_PROCESS, 0)
        self.hurried = False

    def begin(self) -> None:
        """In a thread that begins to encode; the threads that it starts inherit what it sets."""
        if not self.hurried:
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(self._normal, LOW_NICE))

    def hurry(self) -> bool:
        """Somebody waits: new threads start at normal priority. Whether running ones could be raised as well."""
        self.hurried = True
        try:
            for task in Path("/proc/self/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.setpriority(os.PRIO_PROCESS, int(task.name), self._normal)
        except PermissionError:  # without CAP_SYS_NICE a thread can only go down
            return False
        return True

    def relax(self) -> None:
        """Nobody waits any more."""
        self.hurried = False
