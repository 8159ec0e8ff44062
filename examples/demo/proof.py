"""What must hold of a disturbed run beside an undisturbed twin (pure: histories in, verdicts out)."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MAX_LOSS_DIFFERENCE = 1e-5
"""Another number of ranks adds in another order: float32 losses agree to some 5e-7, anything wrong shows above this."""

Digests = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One completed step of one session, all ranks together."""

    number: int  # completed steps, counting this one
    loss: float
    samples: tuple[int, ...]  # dataset indices, sorted


@dataclass(frozen=True, kw_only=True)
class Session:
    """One formation of the world: from its start or restore to its end."""

    ranks: int
    restored_step: int  # 0 for a fresh start
    steps: Mapping[int, Step]
    saved: Digests = field(default_factory=dict)  # what the ranks that saved had in memory, gathered at that moment
    restored: Digests = field(default_factory=dict)  # what these ranks have in memory after the restore, gathered


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim, and whether it holds."""

    claim: str
    valid: bool
    detail: str = field(default="")


def judge(sessions: Sequence[Session], twin: Session, *, acknowledged: Sequence[int], total: int) -> list[Verdict]:
    """Every claim of the demonstration.

    acknowledged  for each session but the last, the newest step that was committed when it ended
    """
    verdicts = [
        nothing_acknowledged_lost(session, step, number)
        for number, (session, step) in enumerate(zip(sessions[1:], acknowledged, strict=True), start=2)
    ]
    verdicts += [tensors_came_back(before, after) for before, after in itertools.pairwise(sessions)]
    history = effective_history(sessions)
    return [*verdicts, losses_agree(history, twin, total), samples_exactly_once(history, twin, total)]


def effective_history(sessions: Sequence[Session]) -> dict[int, Step]:
    """The steps that count: of each session those after its restore and up to the next session's."""
    history: dict[int, Step] = {}
    ends = [session.restored_step for session in sessions[1:]] + [max(sessions[-1].steps, default=0)]
    for session, end in zip(sessions, ends, strict=True):
        history |= {n: step for n, step in session.steps.items() if session.restored_step < n <= end}
    return history


def nothing_acknowledged_lost(session: Session, acknowledged: int, number: int) -> Verdict:
    """The restored step is the newest acknowledged one."""
    return Verdict(
        claim=f"session {number}: nothing committed lost",
        valid=session.restored_step == acknowledged,
        detail=f"acknowledged {acknowledged}, restored {session.restored_step}",
    )


def tensors_came_back(before: Session, after: Session) -> Verdict:
    """Every tensor is, bit for bit, what the former ranks held when they saved."""
    saved, restored = after.saved, after.restored
    claim = f"{before.ranks} -> {after.ranks} ranks: tensors bit for bit"
    if not saved or not restored:
        return Verdict(claim=claim, valid=False, detail="no digests were recorded")
    names = saved.keys() | restored.keys()
    wrong = sorted(name for name in names if saved.get(name) != restored.get(name))
    detail = f"{len(names) - len(wrong)} of {len(names)} at step {after.restored_step}"
    return Verdict(claim=claim, valid=not wrong, detail=detail + (f", first other {wrong[0]}" if wrong else ""))


def losses_agree(history: Mapping[int, Step], twin: Session, total: int) -> Verdict:
    """Each step's loss is the undisturbed run's."""
    claim = "losses: the undisturbed run's"
    missing = _missing(history, twin.steps, total)
    if missing:
        return Verdict(claim=claim, valid=False, detail=missing)
    worst = max(range(1, total + 1), key=lambda n: _difference(history[n].loss, twin.steps[n].loss))
    difference = _difference(history[worst].loss, twin.steps[worst].loss)
    return Verdict(
        claim=claim,
        valid=difference <= MAX_LOSS_DIFFERENCE,
        detail=f"step {worst}: {difference:.1e} of {MAX_LOSS_DIFFERENCE:.0e} allowed",
    )


def samples_exactly_once(history: Mapping[int, Step], twin: Session, total: int) -> Verdict:
    """Each step consumed the samples that it should, none twice and none left out."""
    claim = "every sample exactly once"
    missing = _missing(history, twin.steps, total)
    if missing:
        return Verdict(claim=claim, valid=False, detail=missing)
    counts = collections.Counter(sample for n in range(1, total + 1) for sample in history[n].samples)
    expected = collections.Counter(sample for n in range(1, total + 1) for sample in twin.steps[n].samples)
    twice = sum(1 for sample, count in counts.items() if count > expected[sample])
    left_out = sum(1 for sample, count in expected.items() if count > counts[sample])
    moved = sum(1 for n in range(1, total + 1) if history[n].samples != twin.steps[n].samples)  # steps
    return Verdict(
        claim=claim,
        valid=not twice and not left_out and not moved,
        detail=f"{sum(counts.values())}: {twice} twice, {left_out} lost, {moved} misplaced",
    )


def _difference(a: float, b: float) -> float:
    # inf - inf is nan, which compares as neither larger nor smaller: it would hide.
    return abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf


def _missing(history: Iterable[int], twin: Iterable[int], total: int) -> str:
    wanted = set(range(1, total + 1))
    for name, steps in (("the run", set(history)), ("the undisturbed run", set(twin))):
        if wanted - steps:
            return f"{name} has no step {min(wanted - steps)}"
    return ""
