"""The keeper's own event lines, written only where RESILIENT_KEEPER_LOG names a file."""

from __future__ import annotations

import json
import os
import time

VARIABLE = "RESILIENT_KEEPER_LOG"


class Trace:
    """Appends one JSON object per event to a file, or does nothing."""

    def __init__(self, path: str | None, node: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None
        self._node = node

    def event(self, name: str, **fields: object) -> None:
        """One line; a single write, so that keepers may share a file."""
        if self._fd is None:
            return
        line = {
            "v": 1,
            "wall_ns": time.time_ns(),
            "mono_ns": time.monotonic_ns(),
            "role": "keeper",
            "node": self._node,
            "pid": os.getpid(),
            "event": name,
            **fields,
        }
        os.write(self._fd, json.dumps(line, default=str).encode() + b"\n")
