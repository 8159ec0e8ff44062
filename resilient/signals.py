"""SIGTERM as a wish to stop, to be acted on at a step boundary."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

IMPATIENCE_S = 20.0
"""A SIGTERM this long after the first is meant: it ends the process without a save."""


class StopSignals:
    """Whether a stop is wanted on this rank, by SIGTERM or by `ask`.

    The handler only sets a flag: it may interrupt code that holds any lock. Schedulers and torchrun signal a rank more
    than once, so repetitions are ignored for IMPATIENCE_S; one that comes later does what SIGTERM did before. Once a
    stop is wanted the handler stays until the process ends: what follows the loop must not be cut off.
    Outside the main thread no handler can be installed; `ask` still works.
    """

    def __init__(self) -> None:
        self._wanted = threading.Event()
        self._first_s: float | None = None  # when the first SIGTERM came
        self._installed = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True

    @property
    def wanted(self) -> bool:
        """Whether somebody asked this rank to stop."""
        return self._wanted.is_set()

    def ask(self) -> None:
        """Want a stop."""
        self._wanted.set()

    def restore(self) -> None:
        """Put the former handler back, unless SIGTERM came: then this process is about to end by itself."""
        if self._first_s is None:
            self._put_back()

    def _put_back(self) -> None:
        if self._installed and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._first_s is not None and now_s - self._first_s > IMPATIENCE_S:
            self._put_back()
            signal.raise_signal(signal.SIGTERM)
            return
        self._first_s = now_s if self._first_s is None else self._first_s
        self._wanted.set()
