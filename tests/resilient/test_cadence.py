"""When to save: steps, minutes, tiers, and the interval that "auto" takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.cadence import (
    FIRST_SAVE_S,
    LONGEST_S,
    SHORTEST_S,
    Cost,
    Every,
    Mtbf,
    Plan,
    assumed_mtbf,
    auto_interval,
    due_by_step,
    due_by_time,
    observed_mtbf,
    parse,
)
from resilient.errors import SettingInvalid

HOUR = Mtbf(seconds=3600.0, source="a test")


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"steps": 3, "minutes": 1}, {"steps": 0}, {"steps": -5}, {"steps": 2.0}, {"steps": True},
        {"minutes": 0}, {"minutes": -1}, {"minutes": math.nan}, {"minutes": math.inf}, {"minutes": "5"},
    ],
)  # fmt: skip
def test_a_cadence_that_cannot_be_right_is_refused(wrong):
    with pytest.raises(SettingInvalid):
        Every(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        "daily", 200, None, {}, {"memory": Every(steps=1)}, {"storage": 5},
        {"storage": "auto", "disk": "auto"}, {"storage": "auto", "memory": "auto"},
    ],
)  # fmt: skip
def test_what_is_no_cadence_is_refused_with_what_would_be(wrong):
    with pytest.raises(SettingInvalid) as caught:
        parse(wrong)
    assert "Every(steps=" in caught.value.next


def test_each_way_to_say_it_becomes_a_plan():
    assert parse("auto") == Plan(storage=None)
    assert parse(Every(steps=5)) == Plan(storage=Every(steps=5))
    tiers = parse({"memory": Every(steps=1), "storage": "auto"})
    assert tiers == Plan(storage=None, memory=Every(steps=1))
    assert [parse(each).by_time for each in ("auto", Every(minutes=1), Every(steps=1))] == [True, True, False]


def test_steps_are_due_at_their_multiples_and_never_at_the_start():
    plan = parse(Every(steps=3))
    assert [step for step in range(10) if plan.step_due(step)] == [3, 6, 9]
    assert not any(plan.time_due(seconds) for seconds in (0.0, 1e9))
    assert due_by_step(Every(steps=3), 4).reason == "next at step 6"


def test_minutes_are_due_when_they_have_passed():
    plan = parse(Every(minutes=0.5))
    assert not plan.time_due(29.9)
    assert plan.time_due(30.0)
    assert not plan.step_due(30)
    assert due_by_time(Every(minutes=0.5), 31.0).reason == "31.0 s of 30.0 s since the last save (every 0.5 minutes)"


def test_auto_is_youngs_interval_with_its_numbers_in_the_reason():
    interval = auto_interval(Cost(loop_s=0.5), HOUR)
    assert interval.seconds == pytest.approx(60.0)
    assert interval.reason == "auto: a save costs 0.500 s, a failure every 1.0 h (a test)"
    assert parse("auto").time_due(60.1, cost=Cost(loop_s=0.5), mtbf=HOUR)
    assert not parse("auto").time_due(59.9, cost=Cost(loop_s=0.5), mtbf=HOUR)


def test_the_interval_is_where_the_expected_loss_is_least():
    def loss_per_second(seconds):
        return 2.0 / seconds + seconds / 2 / HOUR.seconds

    best = auto_interval(Cost(loop_s=2.0), HOUR).seconds
    assert all(loss_per_second(best) <= loss_per_second(best * factor) for factor in (0.5, 0.9, 1.1, 2.0))


def test_auto_saves_soon_while_the_cost_is_not_known():
    assert auto_interval(None, HOUR).seconds == FIRST_SAVE_S
    assert parse("auto").time_due(FIRST_SAVE_S)


@given(st.floats(0, 1e4), st.floats(0, 1e5), st.floats(1, 1e9))
def test_auto_stays_in_its_bounds_and_never_queues_saves(loop_s, durable_s, mtbf_s):
    interval = auto_interval(Cost(loop_s=loop_s, durable_s=durable_s), Mtbf(seconds=mtbf_s, source="x"))
    assert max(SHORTEST_S, durable_s) <= interval.seconds <= max(LONGEST_S, durable_s)
    unbounded = math.sqrt(2 * loop_s * mtbf_s)
    assert ("bounded" in interval.reason) == (interval.seconds != unbounded)


def test_a_failure_rate_names_its_source():
    assert assumed_mtbf(16384).seconds == pytest.approx(3.05 * 3600, rel=0.01)
    assert "assumed" in assumed_mtbf(8).source
    assert observed_mtbf(8, 3600.0, 0) == assumed_mtbf(8)
    seen = observed_mtbf(16384, 36_000.0, 9)
    assert seen.seconds == pytest.approx((36_000 + assumed_mtbf(16384).seconds) / 10)
    assert seen.source.startswith("observed: 9 failures in 10.0 h")
