from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from storage.errors import (
    KeyExists,
    KeyMissing,
    OutcomeUnknown,
    StoreDenied,
    StoreError,
    StoreFailed,
    StoreUnavailable,
)
from storage.memory import MemoryStore
from storage.retry import Attempt, RetryingStore, RetryPolicy
from storage.store import Data, ObjectInfo
from tests.storage.faulty import FlakyStore


class Scripted(MemoryStore):
    """Raises the errors of its script one after the other, then works."""

    def __init__(self, *script: StoreError) -> None:
        super().__init__()
        self.script = list(script)

    def _next(self) -> None:
        if self.script:
            raise self.script.pop(0)

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        self._next()
        return super().get(key, max_bytes=max_bytes)

    def put(self, key: str, data: Data) -> None:
        self._next()
        super().put(key, data)

    def put_if_absent(self, key: str, data: Data) -> None:
        self._next()
        super().put_if_absent(key, data)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def patient(inner: MemoryStore, time: Time, **policy: float) -> RetryingStore:
    return RetryingStore(inner, RetryPolicy(**policy), draw=random.Random(7), sleep=time.sleep, now_s=lambda: time.now)


BUSY = StoreUnavailable("busy")
LOST = OutcomeUnknown("lost")


def test_waits_double_up_to_the_longest_and_are_drawn_from_the_given_random() -> None:
    time = Time()
    store = patient(Scripted(*[BUSY] * 8), time, first_wait_s=1.0, max_wait_s=20.0, deadline_s=1000.0)
    store.put("k", b"x")
    assert store.get("k") == b"x"
    draw = random.Random(7)
    longest = [1, 2, 4, 8, 16, 20, 20, 20]
    assert time.slept == [most * draw.uniform(0.5, 1.0) for most in longest]


def test_after_the_deadline_the_last_error_comes_through_without_a_last_sleep() -> None:
    time = Time()
    errors = [StoreUnavailable(f"number {number}") for number in range(100)]
    store = patient(Scripted(*errors), time, first_wait_s=1.0, max_wait_s=4.0, deadline_s=10.0)
    with pytest.raises(StoreUnavailable) as caught:
        store.get("k")
    assert caught.value is errors[len(time.slept)]
    assert 5.0 < time.now <= 10.0


def test_a_deadline_of_nothing_means_one_attempt() -> None:
    time = Time()
    inner = Scripted(BUSY, BUSY)
    with pytest.raises(StoreUnavailable):
        patient(inner, time, deadline_s=0.0).get("k")
    assert (len(inner.script), time.slept) == (1, [])


@pytest.mark.parametrize("kind", [KeyMissing, KeyExists, StoreDenied, StoreFailed])
def test_what_does_not_pass_is_not_repeated(kind: type[StoreError]) -> None:
    time = Time()
    inner = Scripted(kind("for good"), BUSY)
    with pytest.raises(kind):
        patient(inner, time).put("k", b"x")
    assert (len(inner.script), time.slept) == (1, [])


@pytest.mark.parametrize("operation", ["put", "put_if_absent"])
@pytest.mark.parametrize("end", [[BUSY] * 1000, [BUSY, StoreDenied("expired")], [StoreFailed("disk")]])
def test_an_outcome_that_was_unknown_once_stays_unknown(operation: str, end: list[StoreError]) -> None:
    store = patient(Scripted(BUSY, LOST, *end), Time())
    with pytest.raises(OutcomeUnknown) as caught:
        getattr(store, operation)("k", b"x")
    assert end[-1].what in str(caught.value)


def test_what_was_never_unknown_does_not_become_so() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        patient(Scripted(*[BUSY] * 1000), Time()).put_if_absent("k", b"x")
    assert caught.value is BUSY


def test_other_bytes_under_the_key_settle_an_unknown_outcome() -> None:
    inner = Scripted(LOST)
    MemoryStore.put(inner, "k", b"another's")
    with pytest.raises(KeyExists):
        patient(inner, Time()).put_if_absent("k", b"mine")


def test_success_settles_an_unknown_outcome() -> None:
    inner = Scripted(LOST, BUSY, LOST)
    patient(inner, Time()).put_if_absent("k", b"mine")
    assert inner.get("k") == b"mine"


def test_each_failed_attempt_is_told() -> None:
    told: list[Attempt] = []
    time = Time()
    inner = Scripted(BUSY, LOST)
    store = RetryingStore(inner, draw=random.Random(1), sleep=time.sleep, now_s=lambda: time.now, on_retry=told.append)
    store.put_if_absent("k", b"x")
    assert [(each.operation, each.key, each.attempt, each.error, each.wait_s) for each in told] == [
        ("put_if_absent", "k", 1, BUSY, time.slept[0]),
        ("put_if_absent", "k", 2, LOST, time.slept[1]),
    ]


def test_a_listing_that_breaks_off_goes_on_where_it_was() -> None:
    memory = MemoryStore()
    for number in range(30):
        memory.put(f"k{number:02}", b"x" * number)
    flaky = FlakyStore(memory, 5, refuse=0.3)
    store = RetryingStore(flaky, sleep=lambda _: None, draw=random.Random(0))
    assert list(store.list("k")) == list(memory.list("k"))
    assert flaky.faults > 5


def test_a_listing_that_always_breaks_off_at_the_same_place_ends() -> None:
    class Broken(MemoryStore):
        def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
            yield ObjectInfo(key="a", size=1)
            raise StoreUnavailable("always")

    seen = []
    with pytest.raises(StoreUnavailable):
        seen.extend(info.key for info in patient(Broken(), Time()).list())
    assert seen == ["a"]


@pytest.mark.parametrize(
    "wrong", [{"first_wait_s": 0.0}, {"first_wait_s": 9.0, "max_wait_s": 1.0}, {"deadline_s": -1.0}]
)
def test_an_impossible_policy_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(StoreFailed):
        RetryPolicy(**wrong)
