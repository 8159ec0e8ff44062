from __future__ import annotations

import os
from pathlib import Path

import pytest

from storage.errors import KeyMissing, StoreFailed
from storage.local import LocalStore
from storage.memory import MemoryStore
from storage.objects import ObjectStore
from storage.open import open_store, redact
from storage.retry import RetryingStore
from storage.s3 import S3Store
from storage.url import split
from tests.storage.processes import python


def test_an_address_opens_the_store_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for url, root in [
        (tmp_path / "a", tmp_path / "a"),
        (str(tmp_path / "a b"), tmp_path / "a b"),
        ("runs/42", tmp_path / "runs" / "42"),
        ("~/runs", Path("/home/someone/runs")),
        (f"file://{tmp_path}/a%20b", tmp_path / "a b"),
        (f"local://{tmp_path}/a", tmp_path / "a"),
    ]:
        store = open_store(url, retry=False)
        assert isinstance(store, LocalStore)
        assert store.url == str(root)
    assert isinstance(open_store("memory://x", retry=False), MemoryStore)
    for s3 in ("s3://bucket/run", "S3://bucket/run/", "s3a://bucket"):
        assert isinstance(open_store(s3, retry=False), S3Store)
    assert isinstance(open_store("github://owner:repo@/", retry=False), ObjectStore)


def test_passing_faults_are_retried_unless_told_otherwise(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert isinstance(store, RetryingStore)
    assert isinstance(store.inner, LocalStore)
    assert (store.url, store.conditional) == (str(tmp_path), True)


def test_a_memory_is_the_same_for_all_who_name_it() -> None:
    open_store("memory://shared").put("k", b"x")
    assert open_store("memory://shared").get("k") == b"x"
    with pytest.raises(KeyMissing):
        open_store("memory://another").get("k")


@pytest.mark.parametrize("url", ["", "s3://", "s3:///", "file://", "simplecache::s3://bucket/run"])
def test_an_address_without_a_place_is_refused(url: str) -> None:
    with pytest.raises(StoreFailed):
        open_store(url)


def test_an_unknown_kind_of_address_is_refused_at_the_first_use() -> None:
    store = open_store("nosuchthing://user:hush@host/run", {"password": "hush"}, retry=False)
    with pytest.raises(StoreFailed) as caught:
        store.get("k")
    assert "hush" not in str(caught.value)
    assert "nosuchthing://host/run" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://KEY:SECRET@bucket/run", "s3://bucket/run"),
        ("s3://KEY:S@CRET@bucket/run", "s3://bucket/run"),
        ("https://host/run?X-Amz-Signature=SECRET", "https://host/run"),
        ("https://host/run#SECRET", "https://host/run"),
        ("https://host?SECRET@x", "https://host"),
        ("/plain/path@home?x#y", "/plain/path@home?x#y"),
    ],
)
def test_an_address_is_shown_without_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_an_address_is_split_into_kind_and_place() -> None:
    assert split("S3://bucket/run") == ("s3", "bucket/run")
    assert split("/tmp/x") == ("file", "/tmp/x")
    assert split("memory://") == ("memory", "")


def test_opening_a_path_loads_no_client_of_object_storage(tmp_path: Path) -> None:
    code = """
import sys
import storage
from storage.open import open_store
store = open_store(sys.argv[1])
store.put("k", b"x")
heavy = {"s3fs", "fsspec", "botocore", "aiobotocore", "aiohttp", "torch", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""
    done = python(code, os.fspath(tmp_path))
    assert done.stdout.strip() == "[]", done.stderr


def test_the_package_gives_its_names_and_no_others() -> None:
    import storage

    assert storage.open_store is open_store
    with pytest.raises(AttributeError):
        _ = storage.nothing
