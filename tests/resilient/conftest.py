"""Property tests run without a time limit per example: how fast a loaded machine is says nothing about them."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
