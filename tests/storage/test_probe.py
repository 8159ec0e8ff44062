from __future__ import annotations

import pytest

from storage.errors import KeyExists, StoreUnavailable, StoreUnsupported
from storage.memory import MemoryStore
from storage.objects import ObjectStore
from storage.probe import probe_put_if_absent
from storage.store import Data
from tests.s3 import S3Server


class Overwriting(MemoryStore):
    """Takes a conditional put for a plain one, as servers do that ignore the header."""

    def put_if_absent(self, key: str, data: Data) -> None:
        self.put(key, data)


class RefusingButWriting(MemoryStore):
    def put_if_absent(self, key: str, data: Data) -> None:
        try:
            super().put_if_absent(key, data)
        except KeyExists:
            self.put(key, data)
            raise


class RefusingRepetition(MemoryStore):
    def put_if_absent(self, key: str, data: Data) -> None:
        if any(info.key == key for info in self.list("probe/")):
            raise KeyExists("there already")
        self.put(key, data)


class SecondThoughts(MemoryStore):
    """Right one after the other; accepts everyone who comes at once."""

    def put_if_absent(self, key: str, data: Data) -> None:
        if key.endswith("at-once"):
            self.put(key, data)
        else:
            super().put_if_absent(key, data)


@pytest.mark.parametrize("kind", [Overwriting, RefusingButWriting, RefusingRepetition, SecondThoughts])
def test_a_store_that_breaks_the_promise_is_found_out(kind: type[MemoryStore]) -> None:
    store = kind()
    with pytest.raises(StoreUnsupported):
        probe_put_if_absent(store)
    assert list(store.list()) == []


def test_a_store_that_does_not_claim_it_is_not_tried() -> None:
    store = ObjectStore("memory://unclaimed")
    with pytest.raises(StoreUnsupported):
        probe_put_if_absent(store)
    assert list(store.list()) == []


def test_a_store_that_keeps_the_promise_passes_and_is_left_clean() -> None:
    store = MemoryStore()
    probe_put_if_absent(store)
    assert list(store.list()) == []


@pytest.mark.s3
def test_s3_passes(s3_server: S3Server, s3_url: str) -> None:
    store = s3_server.store(s3_url)
    probe_put_if_absent(store)
    assert list(store.list()) == []


def test_other_errors_of_the_store_come_through() -> None:
    class Away(MemoryStore):
        def put_if_absent(self, key: str, data: Data) -> None:
            raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        probe_put_if_absent(Away())
