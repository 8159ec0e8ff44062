"""The run's log: one truth, written by put-if-absent only."""

from __future__ import annotations

from resilient.log.entries import Base, Commit, Drop, Entry, Epoch, Generation, Ref, State
from resilient.log.run_log import Leader, RunLog, SingleWriterWarning, Surroundings
from resilient.log.validity import fold
from resilient.log.view import EMPTY, Committed, LogView, Opened

__all__ = [
    "EMPTY",
    "Base",
    "Commit",
    "Committed",
    "Drop",
    "Entry",
    "Epoch",
    "Generation",
    "Leader",
    "LogView",
    "Opened",
    "Ref",
    "RunLog",
    "SingleWriterWarning",
    "State",
    "Surroundings",
    "fold",
]
