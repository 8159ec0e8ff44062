"""Fault-tolerant training state for PyTorch: wrap a loop in `resilient.context`, and it can be stopped at any moment.

Attributes are imported on first use, so that processes which only move bytes load neither torch nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resilient.cadence import Every
    from resilient.checkpoint.retention import Keep
    from resilient.checkpoint.state import PerRank, trainable
    from resilient.checkpointer import Checkpointer
    from resilient.context_manager import From, context
    from resilient.errors import Preempted
    from resilient.run import Run
    from resilient.sampler import Sampler
    from resilient.world_view import World, world
    from storage.errors import ResilientError

__all__ = [
    "Checkpointer",
    "Every",
    "From",
    "Keep",
    "PerRank",
    "Preempted",
    "ResilientError",
    "Run",
    "Sampler",
    "World",
    "context",
    "trainable",
    "world",
]

_HOMES = {
    "Checkpointer": "resilient.checkpointer",
    "Every": "resilient.cadence",
    "From": "resilient.context_manager",
    "Keep": "resilient.checkpoint.retention",
    "PerRank": "resilient.checkpoint.state",
    "Preempted": "resilient.errors",
    "ResilientError": "storage.errors",
    "Run": "resilient.run",
    "Sampler": "resilient.sampler",
    "World": "resilient.world_view",
    "context": "resilient.context_manager",
    "trainable": "resilient.checkpoint.state",
    "world": "resilient.world_view",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    # The homes are called otherwise than what they hold: importing `resilient.world` would set that very attribute.
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
