"""Every store against the one contract."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.objects import ObjectStore
from storage.retry import RetryingStore, RetryPolicy
from storage.store import Store
from tests.s3 import S3Server
from tests.storage.contract import SharedStoreContract, StoreContract
from tests.storage.faulty import FlakyStore


def retrying(inner: Store) -> RetryingStore:
    """Tries for ever, without waiting: what is left visible are wrong answers."""
    return RetryingStore(
        inner,
        RetryPolicy(first_wait_s=1e-9, max_wait_s=1e-9, deadline_s=1e9),
        draw=random.Random(0),
        sleep=lambda _: None,
    )


class TestMemory(SharedStoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore("contract")


class TestLocal(SharedStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = LocalStore(tmp_path / "not" / "yet" / "there")
        yield store
        store.close()


@pytest.mark.s3
class TestS3(SharedStoreContract):
    @pytest.fixture
    def store(self, s3_server: S3Server, s3_url: str) -> Store:
        return s3_server.store(s3_url)


@pytest.mark.s3
class TestS3ReadInManyRanges:
    @pytest.fixture
    def store(self, s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
        monkeypatch.setattr("storage.s3._READ_BYTES", 70_001)
        return retrying(s3_server.store(s3_url))

    test_an_object = SharedStoreContract.test_objects_larger_than_a_block_survive
    test_bounds = SharedStoreContract.test_more_than_the_reader_allows_is_refused
    test_a_reader = SharedStoreContract.test_a_reader_sees_the_old_bytes_or_the_new


class TestRetryingOverRefusals(SharedStoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return retrying(FlakyStore(MemoryStore(), 1, refuse=0.4))


class TestRetryingOverLostReplies(SharedStoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return retrying(FlakyStore(MemoryStore(), 2, refuse=0.2, lose_reply=0.5))


class TestRetryingOverLostRepliesOfADisk(SharedStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return retrying(FlakyStore(LocalStore(tmp_path), 3, refuse=0.2, lose_reply=0.5))


class TestFsspecMemory(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return ObjectStore(f"memory://{tmp_path.name}")


class TestFsspecFiles(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return ObjectStore(f"file://{tmp_path}/not/yet/there")
