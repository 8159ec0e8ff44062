"""The model check: no violation with all rules, and one for each rule that is left out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.resilient.log.model import run, sweep
from tests.resilient.log.model_rules import RULES

SHORT_SEEDS = 120
LONG_SEEDS = 6000
SEEDS_PER_RULE = 60
# Rules whose absence shows only in a rare order of events: where their short search begins.
FIRST_SEED = {"damage ends the count of earlier snapshots": 140}
LONG_SEEDS_PER_RULE = 1500


def test_random_schedules_violate_nothing() -> None:
    found, happened = sweep(SHORT_SEEDS)
    assert found is None, (
        f"{found.violation}\nreplay: python -m tests.resilient.log.model --seeds 1 --seed {found.seed}"
    )
    # A check in which nothing goes wrong would prove nothing.
    for event, at_least in {
        "commits": 500, "generations": 300, "readings": 1000, "bases": 100, "drops": 100, "fenced": 100,
        "delayed puts": 100, "deaths": 30, "damaged entries": 20, "damaged hints": 20, "orphans": 50,
        "refused: OffLine": 5, "refused: Fenced": 50, "saves unknown": 1,
    }.items():  # fmt: skip
        assert happened[event] >= at_least, (event, happened)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, LONG_SEEDS, 1000))
def test_thousands_of_random_schedules_violate_nothing(first: int) -> None:
    found, _ = sweep(1000, first)
    assert found is None, (
        f"{found.violation}\nreplay: python -m tests.resilient.log.model --seeds 1 --seed {found.seed}"
    )


@pytest.mark.parametrize("rule", RULES)
def test_leaving_out_a_rule_is_noticed(rule: str) -> None:
    found, _ = sweep(SEEDS_PER_RULE, FIRST_SEED.get(rule, 0), rule)
    assert found is not None, f"without {rule!r} nothing was violated"
    assert found.violation


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("rule", RULES)
def test_leaving_out_a_rule_is_noticed_wherever_the_search_begins(rule: str) -> None:
    found, _ = sweep(LONG_SEEDS_PER_RULE, 100_000, rule)
    assert found is not None, f"without {rule!r} nothing was violated"


def test_a_seed_replays_exactly() -> None:
    assert run(17) == run(17)
    assert run(3, "put if absent") == run(3, "put if absent")


def test_the_command_prints_how_to_replay_a_violation() -> None:
    command = [sys.executable, "-m", "tests.resilient.log.model", "--seeds", "5", "--without", "put if absent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "replay: python -m tests.resilient.log.model --seeds 1 --seed" in done.stdout.splitlines()[-1]


# Each found a fault in a draft of the rules.
@pytest.mark.parametrize(
    "seed",
    [
        11,  # a commit used data whose drop was a damaged entry
        27,  # a commit became invalid because the entry of one whose data it used was damaged
        88,  # a job that had slept since step 4 took the lead and left 72 steps behind
        129,
    ],
)
def test_seeds_that_once_failed(seed: int) -> None:
    assert run(seed).violation is None
