"""The store that the log's tests write to."""

from __future__ import annotations

import pytest

from tests.resilient.log.stores import Watched


@pytest.fixture
def store() -> Watched:
    """An empty one, which records what is asked of it."""
    return Watched()
