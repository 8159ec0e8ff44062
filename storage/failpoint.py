"""Failpoints: named places at which a test makes this very process fail.

`failpoint("commit.before_entry")` is a dictionary look-up in an empty dictionary unless RESILIENT_FAILPOINTS arms it:

    RESILIENT_FAILPOINTS="commit.before_entry=kill;writer.part=raise@3"

Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP to itself), `raise` (FailpointReached), `exit` (os._exit(41)).
`@N` fires at the N-th passage only; without it, at every one.
"""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass

from storage.errors import ResilientError

VARIABLE = "RESILIENT_FAILPOINTS"
ACTIONS = ("kill", "stop", "raise", "exit")


class FailpointReached(ResilientError):
    """An armed failpoint with the action `raise` was passed."""


class FailpointSyntax(ResilientError):
    """RESILIENT_FAILPOINTS (or the text given to `arm`) cannot be read."""


@dataclass(frozen=True, kw_only=True)
class _Armed:
    action: str
    at: int | None  # passage number, from 1; None: each


_armed: dict[str, _Armed] = {}
_passed: dict[str, int] = {}
_lock = threading.Lock()


def parse(text: str) -> dict[str, _Armed]:
    """What the text arms. Raises FailpointSyntax."""
    armed = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        name, _, action = item.partition("=")
        action, _, at = action.partition("@")
        if not name or action not in ACTIONS or ("@" in item and not (at.isdigit() and int(at))):
            raise FailpointSyntax(f"{item!r} is not NAME=ACTION[@N]", next=f"ACTION is one of {', '.join(ACTIONS)}")
        armed[name] = _Armed(action=action, at=int(at) if at else None)
    return armed


def arm(text: str) -> None:
    """Arm exactly the failpoints of `text` in this process; an empty text disarms all."""
    with _lock:
        armed = parse(text)
        _armed.clear()
        _passed.clear()
        _armed.update(armed)


def failpoint(name: str) -> None:
    """Fail here if armed. Raises FailpointReached for the action `raise`."""
    if not _armed:
        return
    _pass(name)


def _pass(name: str) -> None:
    with _lock:
        armed = _armed.get(name)
        if armed is None:
            return
        _passed[name] = _passed.get(name, 0) + 1
        if armed.at is not None and _passed[name] != armed.at:
            return
    if armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif armed.action == "stop":
        # To this very thread: sent to the process, another thread may take it while this one runs on.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif armed.action == "exit":
        os._exit(41)
    else:
        raise FailpointReached(f"failpoint {name} was armed to raise", where=f"process {os.getpid()}")


arm(os.environ.get(VARIABLE, ""))
