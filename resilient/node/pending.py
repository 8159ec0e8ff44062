"""The future of one save, as the worker sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from resilient.errors import TimedOut
from resilient.node.messages import CommitInfo, SaveId
from storage.errors import ResilientError


class Pending:
    """A save under way. It ends the same way on every rank: committed, or failed with the same error.

    step    the step that is being saved
    commit  what became of it, once `done()` and committed
    """

    def __init__(self, save: SaveId, *, hurry: Callable[[], None] = lambda: None) -> None:
        self.step, self.nonce = save.step, save.nonce
        self.commit: CommitInfo | None = None
        self.asked = False  # whether somebody was told how it ended
        self._hurry = hurry
        self._done = threading.Event()
        self._sealed = threading.Event()
        self._error: dict[str, str] | None = None

    @staticmethod
    def failed(step: int, error: ResilientError) -> Pending:
        """A save that ended before it began."""
        pending = Pending(SaveId(step, ""))
        pending.fail(error)
        return pending

    @staticmethod
    def settled(step: int) -> Pending:
        """A step that is committed already."""
        pending = Pending(SaveId(step, ""))
        pending.mark_sealed()
        pending._done.set()
        return pending

    def staged(self) -> bool:
        """The snapshot is taken: the state may change. True from the start for a snapshot made in the foreground."""
        return True

    def sealed(self) -> bool:
        """Every rank of this node has handed over its snapshot: the save no longer needs these workers."""
        return self._sealed.is_set()

    def done(self) -> bool:
        """Committed or failed."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, at most `timeout` seconds; whether it is. Raises nothing."""
        return self._done.wait(timeout)

    def result(self, timeout: float | None = None) -> int:
        """The step, once it is committed; waits at most `timeout` seconds and lets the keeper hurry meanwhile.

        Raises what the save failed with (SaveFailed, KeeperLost, StepExists, Fenced, StoreError ...). TimedOut means
        only that it is still under way: waiting again is allowed.
        """
        if not self._done.is_set():
            if timeout is None or timeout > 0:
                self._hurry()
            if not self._done.wait(timeout):
                raise TimedOut(
                    f"the save of step {self.step} is still under way after {timeout:g} s of waiting",
                    next="wait again; nothing was given up",
                )
        self.asked = True
        if self._error is not None:
            raise ResilientError.from_wire(self._error)
        return self.step

    # ---- called by the client
    def mark_sealed(self) -> None:
        """The keeper has everything from this node."""
        self._sealed.set()

    def succeed(self, info: CommitInfo) -> None:
        """The commit entry is in the log."""
        if not self._done.is_set():
            self.commit = info
            self._sealed.set()
            self._done.set()

    def fail(self, error: ResilientError) -> None:
        """It will not be committed (or nobody knows)."""
        if not self._done.is_set():
            self._error = error.to_wire()
            self._done.set()
