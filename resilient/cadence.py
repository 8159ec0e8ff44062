"""How often to save: steps, minutes, or the interval that loses least (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from resilient.errors import SettingInvalid

ASSUMED_ACCELERATOR_HOURS_PER_FAILURE = 50_000.0
"""Until a run has failures of its own: Llama 3's 419 unexpected interruptions in 54 days of 16,384 GPUs (table 5)."""

FIRST_SAVE_S = 60.0
"""When "auto" saves first: early, because only then is the cost of a save known."""

SHORTEST_S = 10.0
LONGEST_S = 3600.0
"""Bounds of "auto": beyond an hour, power cuts and preemptions that no failure rate counts weigh more than the cost."""

TIERS = ("memory", "storage")


@dataclass(frozen=True)
class Every:
    """Every so many steps, or minutes: exactly one. Raises SettingInvalid."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise SettingInvalid(
                f"Every(steps={self.steps}, minutes={self.minutes}) needs exactly one of the two",
                next="for example Every(steps=200), or Every(minutes=10)",
            )
        if self.steps is not None and not (_is_number(self.steps, int) and self.steps >= 1):
            raise SettingInvalid(f"Every(steps={self.steps!r}) must be a whole number of at least 1")
        if self.minutes is not None and not (_is_number(self.minutes, int, float) and 0 < self.minutes < math.inf):
            raise SettingInvalid(f"Every(minutes={self.minutes!r}) must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class Mtbf:
    """Mean time between failures of the whole run, and where the number comes from."""

    seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a save was measured to cost."""

    loop_s: float  # that the training loop lost: stall plus slowed steps
    durable_s: float = 0.0  # from its start until it was committed


@dataclass(frozen=True, kw_only=True)
class Due:
    """Whether to save now, and why."""

    save: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Seconds between the starts of two saves, and why."""

    seconds: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """When each tier is due; None for `storage` means "auto", for `memory` that there is no tier of its own.

    Saves by steps are a function of the step alone, so every rank decides them alike. Saves by time depend on a
    clock: one rank decides, the others are told (`by_time`).
    """

    storage: Every | None
    memory: Every | None = None

    @property
    def by_time(self) -> bool:
        """Whether a clock decides about the storage tier."""
        return self.storage is None or self.storage.minutes is not None

    def step_due(self, step: int) -> bool:
        """Whether `step` completed steps are a reason to save, on every rank."""
        return due_by_step(self.storage, step).save

    def time_due(self, since_s: float, *, cost: Cost | None = None, mtbf: Mtbf | None = None) -> bool:
        """Whether `since_s` seconds since the last save are a reason; for the one rank that decides."""
        return due_by_time(self.storage, since_s, cost=cost, mtbf=mtbf).save


def parse(every: Every | str | Mapping[str, Every | str]) -> Plan:
    """The plan that `every=` of the context means. Raises SettingInvalid with what would be right."""
    if not isinstance(every, Mapping):
        return Plan(storage=_tier("storage", every))
    unknown = sorted(set(every) - set(TIERS))
    if unknown or "storage" not in every:
        raise SettingInvalid(
            f"every= has the tiers {sorted(every)}; the tiers are {list(TIERS)}, and storage is needed",
            next='for example {"memory": Every(steps=1), "storage": Every(steps=200)}',
        )
    memory = _tier("memory", every["memory"]) if "memory" in every else None
    if "memory" in every and memory is None:
        raise SettingInvalid('the memory tier has no "auto"', next="a save to memory is cheap: Every(steps=1)")
    return Plan(storage=_tier("storage", every["storage"]), memory=memory)


def due_by_step(every: Every | None, step: int) -> Due:
    """Whether `step` completed steps are a multiple of the steps asked for."""
    if every is None or every.steps is None:
        return Due(save=False, reason="time decides, not steps")
    if step > 0 and step % every.steps == 0:
        return Due(save=True, reason=f"step {step} is a multiple of {every.steps}")
    return Due(save=False, reason=f"next at step {(step // every.steps + 1) * every.steps}")


def due_by_time(every: Every | None, since_s: float, *, cost: Cost | None = None, mtbf: Mtbf | None = None) -> Due:
    """Whether `since_s` seconds since the last save are enough; None for `every` is "auto"."""
    if every is not None and every.minutes is None:
        return Due(save=False, reason="steps decide, not time")
    if every is not None and every.minutes is not None:
        interval = Interval(seconds=every.minutes * 60.0, reason=f"every {every.minutes:g} minutes")
    else:
        interval = auto_interval(cost, mtbf or assumed_mtbf(1))
    save = since_s >= interval.seconds
    return Due(save=save, reason=f"{since_s:.1f} s of {interval.seconds:.1f} s since the last save ({interval.reason})")


def auto_interval(cost: Cost | None, mtbf: Mtbf) -> Interval:
    """sqrt(2 * cost * MTBF), where saving costs as much as the work to be lost (Young 1974; Daly 2006, first order).

    Never shorter than the last save took to become durable, else saves would queue up.
    """
    if cost is None:
        return Interval(seconds=FIRST_SAVE_S, reason="auto: no save measured yet")
    best = math.sqrt(2.0 * max(0.0, cost.loop_s) * mtbf.seconds)
    seconds = max(min(max(best, SHORTEST_S), LONGEST_S), cost.durable_s)
    bound = "" if seconds == best else f", bounded from {best:.0f} s"
    return Interval(
        seconds=seconds,
        reason=f"auto: a save costs {cost.loop_s:.3f} s, a failure every {mtbf.seconds / 3600:.1f} h "
        f"({mtbf.source}){bound}",
    )


def assumed_mtbf(accelerators: int) -> Mtbf:
    """What a run on so many accelerators (or ranks) can expect before it has seen anything."""
    seconds = ASSUMED_ACCELERATOR_HOURS_PER_FAILURE * 3600.0 / max(1, accelerators)
    return Mtbf(
        seconds=seconds,
        source=f"assumed: one failure per {ASSUMED_ACCELERATOR_HOURS_PER_FAILURE:,.0f} accelerator hours, "
        f"{max(1, accelerators)} of them",
    )


def observed_mtbf(accelerators: int, run_s: float, failures: int) -> Mtbf:
    """From a run's own record; the assumption counts as one failure, so the first of its own does not rule alone."""
    assumed = assumed_mtbf(accelerators)
    if failures < 1:
        return assumed
    return Mtbf(
        seconds=(assumed.seconds + max(0.0, run_s)) / (1 + failures),
        source=f"observed: {failures} failures in {run_s / 3600:.1f} h, and one in the assumed "
        f"{assumed.seconds / 3600:.1f} h",
    )


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _tier(name: str, every: object) -> Every | None:
    if isinstance(every, Every):
        return every
    if every == "auto":
        return None
    raise SettingInvalid(
        f"{name}: {every!r} is not a cadence",
        next='use Every(steps=...), Every(minutes=...) or "auto"; or per tier {"memory": ..., "storage": ...}',
    )
