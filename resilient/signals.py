"""SIGTERM as a wish to stop, to be acted on at a step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignals:
    """Whether a stop is wanted on this rank, by SIGTERM or by `ask`.

    The handler only sets a flag: it may interrupt code that holds any lock. A second SIGTERM does what it did before.
    Outside the main thread no handler can be installed; `ask` still works.
    """

    def __init__(self) -> None:
        self._wanted = threading.Event()
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
        """Put the former handler back."""
        if self._installed and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._wanted.set()
        self.restore()
