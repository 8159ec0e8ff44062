"""Small programs in processes of their own, what is in a directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def names(directory: Path) -> list[str]:
    """What is in the directory, hidden files too."""
    return sorted(path.name for path in directory.iterdir())


def python(
    code: str, *arguments: str, before: tuple[str, ...] = (), text: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with arguments, standard input and environment; `before` is a command that runs Python."""
    return subprocess.run(
        [*before, sys.executable, "-c", code, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), **environment},
        check=False,
    )
