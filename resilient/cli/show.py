"""How commands print: sizes, times and names that cannot harm a terminal."""

from __future__ import annotations

import datetime as dt
import json
import sys

from rich.console import Console
from rich.text import Text


def console() -> Console:
    """The terminal, or a pipe: then unbroken plain lines."""
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty(), highlight=False)


def size(nbytes: int) -> str:
    """Bytes in units of 1000, as disks and networks are sold."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} PB"


def ratio(raw_bytes: int, stored_bytes: int) -> float | None:
    """How many times smaller it became; None where nothing is stored."""
    return round(raw_bytes / stored_bytes, 4) if stored_bytes else None


def times(value: float | None) -> str:
    """A ratio for people."""
    return "" if value is None else (f"×{value:.3f}" if value < 100 else f"×{value:.0f}")


def wall(wall_ns: int) -> str:
    """Local time to the second."""
    return dt.datetime.fromtimestamp(wall_ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def safe(text: str, max_chars: int = 200) -> str:
    """Text that came from a file, without control characters and of bounded length."""
    shown = text if len(text) <= max_chars else text[: max_chars - 1] + "…"
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)


def plain(text: str, style: str = "") -> Text:
    """The same for rich, which would take [brackets] for markup."""
    return Text(safe(text), style=style)


def dump(value: object) -> str:
    """JSON as commands print it."""
    return json.dumps(value, indent=2, allow_nan=False)
