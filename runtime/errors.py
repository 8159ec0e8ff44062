"""Typed errors of the runtime."""

from __future__ import annotations

from storage.errors import ResilientError


class ConfigInvalid(ResilientError):
    """A configuration names an unknown setting, or gives one a value that cannot be meant."""


class LayoutInvalid(ResilientError):
    """The axes of the layout do not fit the world, the model or the batch; the message shows the arithmetic."""


class DataMissing(ResilientError):
    """The text to train on is not there, or too short for one sample."""
