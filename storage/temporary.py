"""Names of temporary files: they tell a living writer's file from a dead one's."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

PREFIX = ".tmp-"
"""A leading dot: no key can have such a segment, so a temporary file is never listed or read as an object."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that writes a temporary file."""

    machine: str  # of one boot of one machine (or container); process numbers mean something within it only
    process: int
    started: str  # clock ticks since the boot: a process number may be given again, this pair is not


def new_name() -> str:
    """A name that nobody else uses."""
    owner = _this_process(os.getpid())
    return f"{PREFIX}{owner.machine}-{owner.process}-{owner.started}-{secrets.token_hex(6)}"


def owner_of(name: str) -> Owner | None:
    """Who wrote the temporary file of this name; None if it is not such a name."""
    fields = name.removeprefix(PREFIX).split("-")
    if not name.startswith(PREFIX) or len(fields) != 4 or not fields[1].isdigit():
        return None
    return Owner(machine=fields[0], process=int(fields[1]), started=fields[2])


def is_dead(owner: Owner) -> bool | None:
    """Whether the owner has ended; None where this cannot be told (another machine)."""
    if owner.machine != _machine():
        return None
    return _started(owner.process) != owner.started


@lru_cache(maxsize=2)
def _this_process(pid: int) -> Owner:  # the argument makes a forked child ask again
    return Owner(machine=_machine(), process=pid, started=_started(pid) or "0")


@lru_cache(maxsize=1)
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        # Containers of one machine share the boot id but not the numbers of processes.
        space = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return secrets.token_hex(6)  # nothing can be told apart here: nobody's file is ever "dead", only old
    return hashlib.blake2b(f"{boot} {space}".encode(), digest_size=6).hexdigest()


def _started(pid: int) -> str | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()[19]  # field 22; the command before it may hold blanks
