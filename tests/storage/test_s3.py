"""What goes wrong between a client and an S3 server."""

from __future__ import annotations

import json
import random
import socket
import traceback
from collections.abc import Callable, Iterator

import pytest

from storage.errors import (
    KeyExists,
    KeyMissing,
    OutcomeUnknown,
    StoreDenied,
    StoreError,
    StoreFailed,
    StoreFull,
    StoreUnavailable,
    StoreUnsupported,
)
from storage.open import open_store
from storage.retry import RetryingStore, RetryPolicy
from storage.s3 import S3Store
from tests.s3 import BUCKET, S3Server, options
from tests.storage.contract import OPERATIONS, READS
from tests.storage.http_faults import Answering, listening, losing_replies, silent
from tests.storage.processes import python

pytestmark = pytest.mark.s3
WRITES = ("put", "put_if_absent", "delete")


@pytest.fixture(scope="module")
def answering() -> Iterator[tuple[Answering, S3Store]]:
    """What the server answers to everything, and a store on that server."""
    answer = Answering(500, "InternalError")
    with listening(answer) as endpoint:
        yield answer, S3Store(f"s3://{BUCKET}/run", options(endpoint))


def caught_from(store: S3Store, operation: str) -> StoreError:
    with pytest.raises(StoreError) as caught:
        OPERATIONS[operation](store, "log/1")
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "reading", "writing"),
    [
        (403, "AccessDenied", StoreDenied, StoreDenied),
        (403, "InvalidAccessKeyId", StoreDenied, StoreDenied),
        (400, "ExpiredToken", StoreDenied, StoreDenied),
        (503, "SlowDown", StoreUnavailable, StoreUnavailable),
        (429, "TooManyRequests", StoreUnavailable, StoreUnavailable),
        (409, "ConditionalRequestConflict", StoreUnavailable, StoreUnavailable),
        (500, "InternalError", StoreUnavailable, OutcomeUnknown),
        (503, "ServiceUnavailable", StoreUnavailable, OutcomeUnknown),
        (400, "RequestTimeout", StoreUnavailable, OutcomeUnknown),
        (507, "InsufficientStorage", StoreFull, StoreFull),
        (404, "NoSuchBucket", StoreFailed, StoreFailed),
        (400, "AuthorizationHeaderMalformed", StoreFailed, StoreFailed),
    ],
)
def test_what_the_server_answers_becomes_a_typed_error(
    answering: tuple[Answering, S3Store], status: int, code: str, reading: type[StoreError], writing: type[StoreError]
) -> None:
    answer, store = answering
    answer.status, answer.code = status, code
    assert type(caught_from(store, "get")) is reading
    for operation in ("put", "put_if_absent"):
        assert type(caught_from(store, operation)) is writing
    with pytest.raises(reading):
        list(store.list())


def test_a_server_without_conditional_puts_is_told_apart(answering: tuple[Answering, S3Store]) -> None:
    answering[0].status, answering[0].code = 501, "NotImplemented"
    assert type(caught_from(answering[1], "put_if_absent")) is StoreUnsupported


def test_a_conflict_that_cannot_be_read_back_is_unknown(answering: tuple[Answering, S3Store]) -> None:
    # 412 to the put, and to the get that would tell whose bytes are there
    answering[0].status, answering[0].code = 412, "PreconditionFailed"
    assert type(caught_from(answering[1], "put_if_absent")) is OutcomeUnknown


def test_no_secret_is_in_an_error_or_its_traceback() -> None:
    secrets = ("test-access-key", "test-secret-key", "hush")
    with listening(Answering(403, "SignatureDoesNotMatch", "test-access-key test-secret-key hush")) as endpoint:
        address = endpoint.replace("http://", "http://hush:hush@")
        store = S3Store(f"s3://user:hush@{BUCKET}/run?token=hush", options(endpoint))
        gone = S3Store(f"s3://{BUCKET}/run", {**options(address), "token": "hush"})
        for each in (store, gone):
            for operation in OPERATIONS:
                with pytest.raises(StoreError) as caught:
                    OPERATIONS[operation](each, "log/1")
                text = "".join(traceback.format_exception(caught.value)) + repr(caught.value.to_wire())
                assert not [secret for secret in secrets if secret in text], text
        assert "hush" not in store.url + repr(store)


def test_a_server_that_is_not_there_has_done_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    store = S3Store(f"s3://{BUCKET}/run", options(f"http://127.0.0.1:{port}"))
    for operation in OPERATIONS:
        assert type(caught_from(store, operation)) is StoreUnavailable


@pytest.mark.timeout(40)
def test_a_silent_server_costs_a_deadline_not_for_ever() -> None:
    with listening(silent) as endpoint:
        store = S3Store(f"s3://{BUCKET}/run", options(endpoint, read_timeout=0.3))
        for operation in READS:
            assert type(caught_from(store, operation)) is StoreUnavailable


@pytest.mark.timeout(40)
def test_a_call_ends_at_its_deadline_though_the_client_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    # The client's own time-outs do not count while it waits for "100 Continue", which comes before every body.
    monkeypatch.setattr("storage.s3._BASE_DEADLINE_S", 0.5)
    with listening(silent) as endpoint:
        store = S3Store(f"s3://{BUCKET}/run", options(endpoint, read_timeout=1000))
        assert type(caught_from(store, "get")) is StoreUnavailable
        for operation in WRITES:
            assert type(caught_from(store, operation)) is OutcomeUnknown


# The HTTP library repeats a request once whose connection was cut, so two replies must be lost to lose one.
def test_a_put_whose_reply_is_lost_is_unknown_then_found_done(s3_server: S3Server, s3_url: str) -> None:
    direct = s3_server.store(s3_url)
    with listening(losing_replies(s3_server.endpoint, 2)) as endpoint:
        store = S3Store(s3_url, options(endpoint))
        with pytest.raises(OutcomeUnknown):
            store.put_if_absent("log/1", b"mine")
        assert direct.get("log/1") == b"mine"
        store.put_if_absent("log/1", b"mine")
        with pytest.raises(KeyExists):
            store.put_if_absent("log/1", b"another's")


def test_one_lost_reply_is_hidden_by_the_http_library_and_read_back(s3_server: S3Server, s3_url: str) -> None:
    with listening(losing_replies(s3_server.endpoint, 1)) as endpoint:
        store = S3Store(s3_url, options(endpoint))
        store.put_if_absent("log/1", b"mine")  # 412 to the repetition: our own bytes are there
        assert store.get("log/1") == b"mine"


def test_lost_replies_are_repeated_until_it_is_known(s3_server: S3Server, s3_url: str) -> None:
    with listening(losing_replies(s3_server.endpoint, 5)) as endpoint:
        store = RetryingStore(S3Store(s3_url, options(endpoint)), RetryPolicy(first_wait_s=0.01), draw=random.Random(0))
        store.put_if_absent("log/1", b"mine")
        assert store.get("log/1") == b"mine"


def test_a_lost_reply_to_a_read_is_only_unavailable(s3_server: S3Server, s3_url: str) -> None:
    s3_server.store(s3_url).put("log/1", b"x")
    with listening(losing_replies(s3_server.endpoint, 2, method=b"GET")) as endpoint:
        store = S3Store(s3_url, options(endpoint))
        assert type(caught_from(store, "get")) is StoreUnavailable
        assert store.get("log/1") == b"x"


def test_a_missing_bucket_is_not_an_empty_run(s3_server: S3Server) -> None:
    store = S3Store("s3://misspelt/run", s3_server.options())
    with pytest.raises(StoreFailed, match="no such bucket"):
        store.get("log/0")
    with pytest.raises(StoreFailed, match="no such bucket"):
        list(store.list())


def test_a_listing_longer_than_a_page_is_complete(s3_server: S3Server, s3_url: str) -> None:
    store = s3_server.store(s3_url)
    for number in range(7):
        store.put(f"log/{number}", b"x")
    call, pages = store._call, []

    def small_pages(method: str, **arguments: object) -> object:
        pages.append(method)
        return call(method, MaxKeys=3, **arguments)

    store._call = small_pages  # type: ignore[method-assign]
    assert [info.key for info in store.list("log/")] == [f"log/{number}" for number in range(7)]
    assert pages == ["list_objects_v2"] * 3


def test_only_valid_keys_below_the_prefix_are_listed(s3_server: S3Server, s3_url: str) -> None:
    store = s3_server.store(s3_url)
    store.put("a", b"x")
    name = f"{s3_url.removeprefix(f's3://{BUCKET}/')}"
    for stranger in (f"{name}/with blank", f"{name}/.hidden", f"{name}/folder/", f"{name}-other/a", name):
        store._system().call_s3("put_object", Bucket=BUCKET, Key=stranger, Body=b"")
    assert [info.key for info in store.list()] == ["a"]


def test_two_stores_see_each_others_puts_at_once(s3_server: S3Server, s3_url: str) -> None:
    writer, reader = S3Store(s3_url, s3_server.options()), s3_server.store(s3_url)
    assert list(reader.list()) == []
    with pytest.raises(KeyMissing):
        reader.get("log/1")
    writer.put("log/1", b"1")
    assert (reader.get("log/1"), [info.key for info in reader.list()]) == (b"1", ["log/1"])
    writer.put("log/1", b"two")
    assert (reader.get("log/1"), reader.size("log/1")) == (b"two", 3)
    writer.delete("log/1")
    assert list(reader.list()) == []


FORK = """
import json, os, sys
from storage.open import open_store
given = json.loads(sys.stdin.read())
store = open_store(given["url"], given["options"])
store.put("parent/1", b"1")
child = os.fork()
if child == 0:
    status = 1
    try:
        assert store.get("parent/1") == b"1"
        store.put_if_absent("child/1", b"2")
        status = 0
    finally:
        os._exit(status)
_, status = os.waitpid(child, 0)
assert status == 0, status
store.put("parent/2", store.get("child/1"))
print(sorted(info.key for info in store.list()))
"""


def test_a_forked_child_opens_connections_of_its_own(s3_server: S3Server, s3_url: str) -> None:
    done = python(FORK, text=json.dumps({"url": s3_url, "options": s3_server.options()}))
    assert done.stdout.strip() == "['child/1', 'parent/1', 'parent/2']", done.stderr


def test_options_that_s3fs_does_not_know_are_refused(s3_url: str) -> None:
    for wrong in ({"no_such_option": 1}, {"key": "a", "username": "b"}, {"client_kwargs": {"no_such_option": 1}}):
        with pytest.raises(StoreFailed):
            list(S3Store(s3_url, wrong).list())


def test_an_endpoint_that_is_no_address_is_refused(s3_url: str) -> None:
    with pytest.raises(StoreFailed):
        open_store(s3_url, options("not an address"), retry=False).get("log/1")


def test_more_than_one_request_can_carry_is_refused(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.s3._SINGLE_PUT_BYTES", 10)
    store = s3_server.store(s3_url)
    store.put("a", b"x" * 10)
    with pytest.raises(StoreFailed, match="11 bytes"):
        store.put_if_absent("b", b"x" * 11)
    assert [info.key for info in store.list()] == ["a"]


def test_a_body_that_ends_early_is_not_taken_for_the_object() -> None:
    def serve(connection: socket.socket) -> None:
        from tests.storage.http_faults import read_request

        read_request(connection)
        head = b'HTTP/1.1 206 x\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\nETag: "t"\r\n\r\n'
        connection.sendall(head + b"01234")

    with listening(serve) as endpoint:
        store = S3Store(f"s3://{BUCKET}/run", options(endpoint))
        read: Callable[[], bytes]
        for read in (lambda: store.get("k"), lambda: store.get_range("k", 0, 10)):
            with pytest.raises(StoreUnavailable):
                read()
