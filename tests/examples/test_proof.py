"""The demonstration's proof: an honest history is valid, each damage makes exactly the claim invalid that it breaks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from examples.demo.proof import MAX_LOSS_DIFFERENCE, Session, Step, effective_history, judge

TOTAL, BATCH = 12, 5
CLAIMS = ("kept 2", "kept 3", "tensors 2", "tensors 3", "losses", "samples")
"""Short names of what `judge` says of three sessions, in its order."""


@dataclass
class History:
    """What `judge` is given."""

    sessions: list[Session]
    twin: Session
    acknowledged: list[int] = field(default_factory=lambda: [3, 10])

    def invalid(self) -> set[str]:
        verdicts = judge(self.sessions, self.twin, acknowledged=self.acknowledged, total=TOTAL)
        return {name for name, verdict in zip(CLAIMS, verdicts, strict=True) if not verdict.valid}

    def change(self, number: int, **changes: object) -> None:
        """Change a session, from 1."""
        self.sessions[number - 1] = replace(self.sessions[number - 1], **changes)

    def put(self, number: int, step: Step | None, at: int) -> None:
        """Put another step into a session, or take it out."""
        steps = {n: s for n, s in self.sessions[number - 1].steps.items() if n != at}
        self.change(number, steps=steps if step is None else steps | {at: step})


def step(number: int, rounding: float = 0.0) -> Step:
    first = (number - 1) * BATCH
    return Step(number=number, loss=5.3 - 0.1 * number + rounding, samples=tuple(range(first, first + BATCH)))


def steps(first: int, last: int) -> dict[int, Step]:
    return {n: step(n, rounding=5e-7 * (-1) ** n) for n in range(first, last + 1)}


def digests(at: int) -> dict[str, str]:
    names = ("embed", "embed/exp_avg", "embed/exp_avg_sq", "norm", "norm/exp_avg")
    return {name: f"{name}@{at}" for name in names}


def honest() -> History:
    """As the quick story goes: save 2 is killed after seven steps, a stop after step 10, three sessions."""
    return History(
        sessions=[
            Session(ranks=4, restored_step=0, steps=steps(1, 7)),
            Session(ranks=3, restored_step=3, steps=steps(4, 10), saved=digests(3), restored=digests(3)),
            Session(ranks=2, restored_step=10, steps=steps(11, 12), saved=digests(10), restored=digests(10)),
        ],
        twin=Session(ranks=4, restored_step=0, steps={n: step(n) for n in range(1, TOTAL + 1)}),
    )


def somewhere(draw: random.Random) -> tuple[int, Step]:
    """A step that counts, and the session that it counts in."""
    at = draw.randint(1, TOTAL)
    return (1 if at <= 3 else 2 if at <= 10 else 3), step(at)


# ---- mutants: each changes the history in place
def a_loss_is_off_by_2e_5(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    history.put(number, replace(at, loss=at.loss + draw.choice((2e-5, -2e-5))), at.number)


def a_loss_is_not_a_number(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    history.put(number, replace(at, loss=draw.choice((math.nan, math.inf, -math.inf))), at.number)


def both_losses_are_not_numbers(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    broken = replace(at, loss=math.nan)
    history.put(number, broken, at.number)
    history.twin = replace(history.twin, steps={**history.twin.steps, at.number: broken})


def both_losses_are_infinite(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    broken = replace(at, loss=math.inf)
    history.put(number, broken, at.number)
    history.twin = replace(history.twin, steps={**history.twin.steps, at.number: broken})


def losses_swap_places(history: History, draw: random.Random) -> None:
    history.put(2, replace(step(5), loss=step(6).loss), 5)
    history.put(2, replace(step(6), loss=step(5).loss), 6)


def a_step_is_lost(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    history.put(number, None, at.number)


def the_last_steps_were_never_run(history: History, draw: random.Random) -> None:
    history.change(3, steps=steps(11, 11) if draw.random() < 0.5 else {})


def the_twin_lacks_a_step(history: History, draw: random.Random) -> None:
    missing = draw.randint(1, TOTAL)
    history.twin = replace(history.twin, steps={n: s for n, s in history.twin.steps.items() if n != missing})


def a_sample_is_used_twice(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    again = draw.randrange(TOTAL * BATCH)
    history.put(number, replace(at, samples=tuple(sorted((*at.samples, again)))), at.number)


def a_sample_is_left_out(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    left_out = draw.choice(at.samples)
    history.put(number, replace(at, samples=tuple(s for s in at.samples if s != left_out)), at.number)


def one_sample_is_used_instead_of_another(history: History, draw: random.Random) -> None:
    number, at = somewhere(draw)
    history.put(number, replace(at, samples=(*at.samples[1:], TOTAL * BATCH + draw.randrange(100))), at.number)


def two_steps_use_each_others_samples(history: History, draw: random.Random) -> None:
    first, second = draw.sample(range(4, 11), 2)
    history.put(2, replace(step(first), samples=step(second).samples), first)
    history.put(2, replace(step(second), samples=step(first).samples), second)


def one_sample_moves_to_the_next_step(history: History, draw: random.Random) -> None:
    at = draw.randint(4, 9)
    *stay, moves = step(at).samples
    history.put(2, replace(step(at), samples=tuple(stay)), at)
    history.put(2, replace(step(at + 1), samples=(moves, *step(at + 1).samples)), at + 1)


def the_sampler_goes_on_one_batch_too_early(history: History, draw: random.Random) -> None:
    for number in range(4, 11):
        history.put(2, replace(step(number), samples=step(number - 1).samples), number)


def a_tensor_came_back_different(history: History, draw: random.Random) -> None:
    name = draw.choice(sorted(digests(3)))
    history.change(2, restored={**digests(3), name: "other"})


def a_tensor_did_not_come_back(history: History, draw: random.Random) -> None:
    name = draw.choice(sorted(digests(3)))
    history.change(2, restored={n: d for n, d in digests(3).items() if n != name})


def a_tensor_came_back_that_was_not_there(history: History, draw: random.Random) -> None:
    history.change(3, restored={**digests(10), "norm/exp_avg_sq": "0"})


def two_tensors_came_back_as_each_other(history: History, draw: random.Random) -> None:
    a, b = draw.sample(sorted(digests(10)), 2)
    history.change(3, restored={**digests(10), a: digests(10)[b], b: digests(10)[a]})


def no_digests_were_restored(history: History, draw: random.Random) -> None:
    history.change(2, restored={})


def no_digests_were_saved(history: History, draw: random.Random) -> None:
    history.change(3, saved={})


def no_digests_at_all(history: History, draw: random.Random) -> None:
    history.change(3, saved={}, restored={})


def an_older_step_is_restored_than_was_acknowledged(history: History, draw: random.Random) -> None:
    older = draw.randint(0, 2)
    history.change(2, restored_step=older, steps=steps(older + 1, 10))


def a_newer_step_is_restored_than_was_acknowledged(history: History, draw: random.Random) -> None:
    newer = draw.randint(4, 7)  # half-written: the killed session did run it
    history.change(2, restored_step=newer, steps=steps(newer + 1, 10))


def the_stop_was_acknowledged_and_not_found(history: History, draw: random.Random) -> None:
    older = draw.randint(3, 9)
    history.change(3, restored_step=older, steps=steps(older + 1, 12))


def nothing_was_found_after_the_stop(history: History, draw: random.Random) -> None:
    history.change(3, restored_step=0, steps=steps(1, 12))


LOSSES, SAMPLES, BOTH = {"losses"}, {"samples"}, {"losses", "samples"}
MUTANTS: list[tuple[Callable[[History, random.Random], None], set[str]]] = [
    (a_loss_is_off_by_2e_5, LOSSES),
    (a_loss_is_not_a_number, LOSSES),
    (both_losses_are_not_numbers, LOSSES),
    (both_losses_are_infinite, LOSSES),
    (losses_swap_places, LOSSES),
    (a_step_is_lost, BOTH),
    (the_last_steps_were_never_run, BOTH),
    (the_twin_lacks_a_step, BOTH),
    (a_sample_is_used_twice, SAMPLES),
    (a_sample_is_left_out, SAMPLES),
    (one_sample_is_used_instead_of_another, SAMPLES),
    (two_steps_use_each_others_samples, SAMPLES),
    (one_sample_moves_to_the_next_step, SAMPLES),
    (the_sampler_goes_on_one_batch_too_early, SAMPLES),
    (a_tensor_came_back_different, {"tensors 2"}),
    (a_tensor_did_not_come_back, {"tensors 2"}),
    (a_tensor_came_back_that_was_not_there, {"tensors 3"}),
    (two_tensors_came_back_as_each_other, {"tensors 3"}),
    (no_digests_were_restored, {"tensors 2"}),
    (no_digests_were_saved, {"tensors 3"}),
    (no_digests_at_all, {"tensors 3"}),
    (an_older_step_is_restored_than_was_acknowledged, {"kept 2"}),
    (a_newer_step_is_restored_than_was_acknowledged, {"kept 2"}),
    (the_stop_was_acknowledged_and_not_found, {"kept 3"}),
    (nothing_was_found_after_the_stop, {"kept 3"}),
]


def test_an_honest_history_is_valid():
    assert honest().invalid() == set()


@pytest.mark.parametrize(("mutant", "claims"), MUTANTS, ids=lambda part: getattr(part, "__name__", ""))
@pytest.mark.parametrize("seed", range(8))
def test_each_damage_makes_exactly_its_claim_invalid(mutant, claims, seed):
    history = honest()
    mutant(history, random.Random(seed))
    assert history.invalid() == claims


def test_every_claim_is_broken_by_some_mutant():
    assert set().union(*(claims for _, claims in MUTANTS)) == set(CLAIMS)


def test_what_a_killed_session_did_after_its_last_commit_does_not_count():
    history = honest()
    history.put(1, Step(number=6, loss=math.nan, samples=(0, 0, 0)), 6)
    assert history.invalid() == set()
    effective = effective_history(history.sessions)
    assert sorted(effective) == list(range(1, TOTAL + 1))
    assert effective[6] == history.sessions[1].steps[6]


def test_a_loss_within_rounding_is_the_same():
    history = honest()
    history.put(2, replace(step(8), loss=step(8).loss + 0.9 * MAX_LOSS_DIFFERENCE), 8)
    assert history.invalid() == set()


@pytest.mark.parametrize("sessions", [1, 2])
def test_a_story_of_fewer_sessions_is_judged_too(sessions):
    whole = Session(ranks=4, restored_step=0, steps=steps(1, 12))
    rest = Session(ranks=2, restored_step=12, steps={}, saved=digests(12), restored=digests(12))
    twin = honest().twin
    verdicts = judge([whole, rest][:sessions], twin, acknowledged=[12][: sessions - 1], total=TOTAL)
    assert all(verdict.valid for verdict in verdicts)
    assert len(verdicts) == 2 * sessions
