"""Stores against a dictionary, under operations drawn at random."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from storage.errors import KeyExists, KeyMissing, RangeMissing, TooLarge
from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.store import Store
from tests.s3 import BUCKET, S3Server
from tests.storage.faulty import FlakyStore
from tests.storage.test_contract import retrying

KEYS = ["log/0", "log/1", "log/hint", "data/1/2/n-1.0", "data/1/2-3", "data/1.2", "x"]
keys = st.sampled_from(KEYS)
bodies = st.lists(st.binary(max_size=6), max_size=3)
numbers = st.integers(min_value=-1, max_value=12)


class Machine(RuleBasedStateMachine):
    """One store and one dictionary, given the same orders."""

    def make(self) -> Store:
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.store, self.model = self.make(), dict[str, bytes]()

    @rule(key=keys, body=bodies)
    def put(self, key: str, body: list[bytes]) -> None:
        self.store.put(key, body)
        self.model[key] = b"".join(body)

    @rule(key=keys, body=bodies)
    def put_if_absent(self, key: str, body: list[bytes]) -> None:
        whole = b"".join(body)
        try:
            self.store.put_if_absent(key, body)
        except KeyExists:
            assert self.model[key] != whole
        else:
            assert self.model.setdefault(key, whole) == whole

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.store.delete(key)
        self.model.pop(key, None)

    @rule(key=keys, bound=st.none() | numbers.filter(lambda number: number >= 0))
    def get(self, key: str, bound: int | None) -> None:
        try:
            got: object = self.store.get(key, max_bytes=bound)
        except (KeyMissing, TooLarge) as error:
            got = type(error)
        whole = self.model.get(key)
        want: object = whole
        if whole is None:
            want = KeyMissing
        elif bound is not None and len(whole) > bound:
            want = TooLarge
        assert got == want

    @rule(key=keys, start=numbers, length=numbers)
    def get_range(self, key: str, start: int, length: int) -> None:
        try:
            got: object = self.store.get_range(key, start, length)
        except (KeyMissing, RangeMissing) as error:
            got = type(error)
        whole = self.model.get(key)
        want: object = KeyMissing
        if whole is not None:
            inside = start >= 0 and length >= 0 and start + length <= len(whole)
            want = whole[start : start + length] if inside else RangeMissing
        assert got == want

    @rule(prefix=st.sampled_from(["", "log", "log/", "data/1", "data/1/", "data/1/2/", "nothing/"]))
    def list_some(self, prefix: str) -> None:
        got = [(info.key, info.size) for info in self.store.list(prefix)]
        assert got == [(key, len(body)) for key, body in sorted(self.model.items()) if key.startswith(prefix)]

    @invariant()
    def nothing_is_lost(self) -> None:
        assert {info.key: info.size for info in self.store.list()} == {key: len(b) for key, b in self.model.items()}


def run(make: object, examples: int, steps: int) -> None:
    kind = type("Machine", (Machine,), {"make": make})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_memory_behaves_as_a_dictionary() -> None:
    run(lambda _: MemoryStore(), 60, 30)


def test_a_disk_behaves_as_a_dictionary() -> None:
    with tempfile.TemporaryDirectory() as directory:
        run(lambda _: LocalStore(Path(directory) / uuid.uuid4().hex), 25, 25)


def test_retries_over_lost_replies_behave_as_a_dictionary() -> None:
    run(lambda _: retrying(FlakyStore(MemoryStore(), 11, refuse=0.2, lose_reply=0.3)), 40, 25)


@pytest.mark.s3
def test_s3_behaves_as_a_dictionary(s3_server: S3Server) -> None:
    run(lambda _: s3_server.store(f"s3://{BUCKET}/model/{uuid.uuid4().hex}"), 6, 15)


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.timeout(600)
def test_s3_and_a_disk_behave_as_a_dictionary_for_long(s3_server: S3Server) -> None:
    run(lambda _: s3_server.store(f"s3://{BUCKET}/model/{uuid.uuid4().hex}"), 100, 40)
    with tempfile.TemporaryDirectory() as directory:
        run(lambda _: LocalStore(Path(directory) / uuid.uuid4().hex), 400, 50)
