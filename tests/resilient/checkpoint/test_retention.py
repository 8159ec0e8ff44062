"""Retention: the newest always stays, the best only by a finite metric."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.retention import Keep, to_drop
from resilient.errors import SettingInvalid

NAN, INF = math.nan, math.inf


def commits(**losses):
    """s100=0.5 -> (100, {"loss": 0.5}); None means that no metric was given."""
    return [(int(name[1:]), {} if loss is None else {"loss": loss}) for name, loss in losses.items()]


FIVE = commits(s100=0.5, s200=0.3, s300=0.4, s400=0.9, s500=0.8)


@pytest.mark.parametrize(
    ("keep", "dropped"),
    [
        (Keep(), (100, 200, 300, 400)),
        (Keep(last=3), (100, 200)),
        (Keep(last=9), ()),
        (Keep(every=200), (100, 300)),
        (Keep(last=1, best=2, by="loss"), (100, 400)),
        (Keep(last=2, best=1, by="loss", mode="max"), (100, 200, 300)),
        (Keep(last=1, best=1, by="accuracy"), (100, 200, 300, 400)),
    ],
)
def test_a_step_stays_if_any_rule_keeps_it(keep, dropped):
    assert to_drop(FIVE, keep) == dropped
    assert to_drop(FIVE[::-1], keep) == dropped


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_no_number_is_never_the_best(mode):
    some = commits(s1=NAN, s2=INF, s3=-INF, s4=None, s5=0.7, s6=NAN)
    assert to_drop(some, Keep(last=1, best=2, by="loss", mode=mode)) == (1, 2, 3, 4)


def test_of_equals_the_newer_is_the_best():
    assert to_drop(commits(s1=0.5, s2=0.5, s3=0.9), Keep(best=1, by="loss")) == (1,)


keeps = st.builds(
    lambda last, every, best, mode: Keep(last=last, every=every, best=best, by="loss" if best else None, mode=mode),
    st.integers(1, 5), st.none() | st.integers(1, 7), st.integers(0, 4), st.sampled_from(["min", "max"]),
)  # fmt: skip
histories = st.dictionaries(st.integers(0, 40), st.none() | st.floats()).map(
    lambda found: [(step, {} if loss is None else {"loss": loss}) for step, loss in found.items()]
)


@given(histories, keeps)
def test_the_newest_is_never_dropped_and_dropping_twice_changes_nothing(history, keep):
    dropped = to_drop(history, keep)
    left = [commit for commit in history if commit[0] not in dropped]
    assert to_drop(left, keep) == ()
    if history:
        newest = sorted(step for step, _ in history)[-keep.last :]
        assert not set(newest) & set(dropped)
        assert len(left) <= keep.last + keep.best + (len(history) if keep.every else 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"last": 0}, {"last": -1}, {"last": 2.5}, {"last": True}, {"every": 0}, {"best": -1, "by": "loss"},
        {"best": 2}, {"by": "loss"}, {"best": 1, "by": "loss", "mode": "least"},
    ],
)  # fmt: skip
def test_a_keep_that_cannot_be_right_is_refused(wrong):
    with pytest.raises(SettingInvalid):
        Keep(**wrong)
