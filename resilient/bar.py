"""A progress bar for work that takes long enough to be watched."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

WORTH_SHOWING_BYTES = 256 << 20


@contextlib.contextmanager
def shown_progress(nbytes: int, what: str, *, show: bool) -> Iterator[Callable[[int], None] | None]:
    """Gives a function to be told of each so many bytes done; None where nobody watches or it is soon over.

    Shown on a terminal's standard error only, and gone when the work is.
    """
    if not show or nbytes < WORTH_SHOWING_BYTES or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=nbytes)
        yield lambda done: progress.update(task, advance=done)
