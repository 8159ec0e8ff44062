"""What a save may be called with (pure)."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from resilient.errors import SettingInvalid

MAX_STEP = (1 << 40) - 1
MAX_METRICS = 64
MAX_NAME_CHARS = 64


def check_step(step: Any) -> int:
    """The step as an int. Raises SettingInvalid unless it is a whole number of completed steps."""
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_STEP:
        raise SettingInvalid(
            f"step={step!r} is not a number of completed steps",
            next=f"pass a whole number from 0 to {MAX_STEP}",
        )
    return number


def check_metrics(metrics: Mapping[Any, Any]) -> dict[str, float]:
    """The metrics as floats; those that are not finite are left out. Raises SettingInvalid naming the one it cannot be.

    Tensors of one element are read here.
    """
    numbers: dict[str, float] = {}
    if len(metrics) > MAX_METRICS:
        raise SettingInvalid(f"{len(metrics)} metrics, at most {MAX_METRICS} are kept with a step")
    for name, value in metrics.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
            raise SettingInvalid(f"{name!r} is not the name of a metric", next=f"use up to {MAX_NAME_CHARS} characters")
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SettingInvalid(
                f"metric {name!r} is {str(value)[:80]!r}, not a number: {error}", next="pass loss.item() or a float"
            ) from error
        if math.isfinite(number):
            numbers[name] = number
    return numbers
