"""How commands print: sizes, times and names that cannot harm a terminal."""

from __future__ import annotations

import datetime as dt
import io
import json
import sys

from rich.console import Console, RenderableType
from rich.text import Text

_ENDLESS = 100_000  # columns: nobody wants the lines of a pipe broken


def put(*items: RenderableType) -> None:
    """Print: fitted to a terminal, or as whole lines into a pipe or file."""
    if sys.stdout.isatty():
        Console(file=sys.stdout, highlight=False).print(*items, sep="\n")
        return
    text = io.StringIO()
    Console(file=text, width=_ENDLESS, highlight=False, no_color=True).print(*items, sep="\n")
    sys.stdout.writelines(line.rstrip() + "\n" for line in text.getvalue().splitlines())


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
