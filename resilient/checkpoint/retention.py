"""Retention: which committed steps stay (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resilient.errors import SettingInvalid


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What stays; a step stays if any of the rules keeps it, and the newest always does.

    Raises SettingInvalid for numbers that are not positive, or `best` without `by` and the other way round.
    """

    last: int = 1  # the newest so many
    every: int | None = None  # steps divisible by this, for ever
    best: int = 0  # so many by the metric `by`
    by: str | None = None  # a metric given with the save, e.g. "val_loss"
    mode: str = "min"  # "min": a smaller metric is better; "max": a larger one

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 1), ("best", 0)):
            value = getattr(self, name)
            if name == "every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SettingInvalid(
                    f"Keep({name}={value!r}) must be a whole number of at least {least}",
                    next="the newest step is always kept, so last=1 is the least",
                )
        if self.mode not in ("min", "max"):
            raise SettingInvalid(f"Keep(mode={self.mode!r})", next='use "min" (a loss) or "max" (an accuracy)')
        if bool(self.best) != bool(self.by):
            raise SettingInvalid(
                f"Keep(best={self.best}, by={self.by!r}) needs both", next='for example Keep(best=2, by="val_loss")'
            )


def to_drop(commits: Sequence[tuple[int, Mapping[str, float]]], keep: Keep) -> tuple[int, ...]:
    """The steps that no rule keeps, ascending. `commits`: (step, metrics), in any order, each step once.

    A step is among the best only by a finite metric: nan, inf or none at all never is. Of equals the newer stays.
    """
    ascending = sorted(commits, key=lambda commit: commit[0])
    kept = {step for step, _ in ascending[-keep.last :]}
    if keep.every is not None:
        kept |= {step for step, _ in ascending if step % keep.every == 0}
    if keep.by is not None:
        sign = 1.0 if keep.mode == "min" else -1.0
        ranked = sorted(
            (sign * metrics[keep.by], -step)
            for step, metrics in ascending
            if keep.by in metrics and math.isfinite(metrics[keep.by])
        )
        kept |= {-negated for _, negated in ranked[: keep.best]}
    return tuple(step for step, _ in ascending if step not in kept)
