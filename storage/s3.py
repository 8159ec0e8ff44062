"""A store on S3 and services that speak its protocol, through s3fs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from storage.errors import (
    KeyExists,
    KeyMissing,
    OutcomeUnknown,
    RangeMissing,
    StoreDenied,
    StoreFailed,
    StoreUnavailable,
    StoreUnsupported,
    TooLarge,
)
from storage.s3_errors import answer, is_conflict, typed
from storage.store import Data, ObjectInfo, Store, check_key, check_prefix, is_key, pieces, same_bytes
from storage.url import redact, split

_SINGLE_PUT_BYTES = 5 << 30  # S3's own limit of one request
_READ_BYTES = 32 << 20  # of one request; more is read by several at once
_READS_AT_ONCE = 4
_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 20}
_BASE_DEADLINE_S = 30.0
_SLOWEST_BYTES_PER_S = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one ranged read brought."""

    data: bytes
    object_bytes: int  # of the whole object
    tag: str  # of its version


class S3Store(Store):
    """Objects under a bucket and prefix.

    Conditional puts are single PutObject requests with If-None-Match: conditional multi-part uploads have had several
    winners on servers tried. Nothing is cached. The client's own retries are off, RetryingStore does them; but the
    HTTP library repeats a request once when a connection is cut without a reply. So a conflict is always read back:
    the bytes that are there may be ours. Deadline of a call: 30 s and a second per MB.

    Every process opens its own connections; a forked child does so by itself at its first call.
    """

    conditional = True

    def __init__(self, url: str, storage_options: Mapping[str, object] | None = None) -> None:
        self.url = redact(url).rstrip("/")
        _, rest = split(self.url)
        bucket, _, prefix = rest.strip("/").partition("/")
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._options = dict(storage_options or {})
        self._opened: tuple[int, Any] | None = None  # (process, file system)

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object, see Store.get. One request up to 32 MB."""
        bound = _READ_BYTES if max_bytes is None else min(_READ_BYTES, max_bytes)
        try:
            # One byte more than is expected tells whether the object ends here.
            first = self._read(key, 0, bound + 1)
        except RangeMissing:
            return b""  # no range of an empty object exists
        if max_bytes is not None and first.object_bytes > max_bytes:
            raise TooLarge(f"{first.object_bytes} bytes, at most {max_bytes} were expected", where=self._where(key))
        if first.object_bytes == len(first.data):
            return first.data
        return self._get_large(key, first)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly these bytes, see Store.get_range."""
        if start < 0 or length < 0 or length == 0:
            size = self.size(key)
            if start < 0 or length < 0 or start > size:
                raise RangeMissing(f"{length} bytes at {start}, but the object has {size}", where=self._where(key))
            return b""
        if length > _READ_BYTES:
            out = bytearray(length)
            self._read_ranges(key, start, memoryview(out))
            return bytes(out)
        data = self._read(key, start, length).data
        if len(data) != length:
            raise RangeMissing(f"{len(data)} of {length} bytes at {start}", where=self._where(key))
        return data

    def get_into(self, key: str, start: int, out: memoryview) -> None:
        """The bytes from `start` into `out`, see Store.get_into."""
        if start < 0 or out.nbytes <= _READ_BYTES:
            super().get_into(key, start, out)
        else:
            self._read_ranges(key, start, out.cast("B"))

    def size(self, key: str) -> int:
        """Bytes of the object, see Store.size."""
        with self._errors(key, writing=False):
            return int(self._call("head_object", Key=self._name(key))["ContentLength"])

    def put(self, key: str, data: Data) -> None:
        """Replace the object, see Store.put. After OutcomeUnknown a late request may still overwrite a later put."""
        with self._errors(key, writing=True):
            self._put(key, data)

    def put_if_absent(self, key: str, data: Data) -> None:
        """Create the object, see Store.put_if_absent."""
        with self._errors(key, writing=True):
            try:
                self._put(key, data, IfNoneMatch="*")
            except OSError as error:
                if answer(error).code == "NotImplemented" or answer(error).status == 501:
                    raise StoreUnsupported(
                        "the server does not know conditional puts (If-None-Match)",
                        where=self._where(key),
                        next="use a server that does, or a shared file system",
                    ) from None
                if not is_conflict(error):
                    raise
            else:
                return
        self._settle(key, data)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects in ascending order of key, a page of requests at a time, see Store.list."""
        check_prefix(prefix)
        return self._pages(prefix)

    def delete(self, key: str) -> None:
        """Remove the object, see Store.delete."""
        with self._errors(key, writing=True):
            self._call("delete_object", Key=self._name(key))

    def close(self) -> None:
        """Give back the connections."""
        self._opened = None  # s3fs closes them when its file system is collected

    # ---- parts of the above
    def _put(self, key: str, data: Data, **conditions: Any) -> None:
        views = pieces(data)
        total = sum(view.nbytes for view in views)
        if total > _SINGLE_PUT_BYTES:
            raise StoreFailed(f"{total} bytes, S3 takes {_SINGLE_PUT_BYTES} in one request", where=self._where(key))
        # The client wants one `bytes`, which it keeps until the request is over.
        body = data if isinstance(data, bytes) else b"".join(views)
        self._call("put_object", moved_bytes=total, Key=self._name(key), Body=body, **conditions)

    def _settle(self, key: str, data: Data) -> None:
        """After a conflict: whose bytes are there? A request of ours whose reply was lost also ends here."""
        try:
            existing = self.get(key, max_bytes=sum(view.nbytes for view in pieces(data)))
        except TooLarge:
            same = False
        except KeyMissing:
            raise StoreUnavailable(
                "the key existed and was then deleted", where=self._where(key), next="try again"
            ) from None
        except (StoreUnavailable, StoreDenied) as error:
            raise OutcomeUnknown(
                f"the key exists, but whose bytes it holds could not be read back: {error.what}",
                where=self._where(key),
                next="repeat it with the same bytes",
            ) from None
        else:
            same = same_bytes(existing, data)
        if not same:
            raise KeyExists("the key holds other bytes already", where=self._where(key))

    def _read(self, key: str, start: int, length: int, **conditions: Any) -> _Part:
        """The bytes from `start`, fewer at the object's end; RangeMissing if there are none at all."""
        from fsspec.asyn import sync

        with self._errors(key, writing=False):
            limits = f"bytes={start}-{start + length - 1}"
            said = self._call("get_object", Key=self._name(key), Range=limits, **conditions)
            body = said["Body"]
            try:
                data = bytes(sync(self._system().loop, body.read, timeout=_deadline_s(length)))
            finally:
                body.close()
        # "bytes 0-9/100"; a server that ignores Range, or has an empty object, sends all of it
        total = str(said.get("ContentRange") or "").rpartition("/")[2]
        if not total.isdigit():
            data, total = data[start : start + length], str(len(data))
        if len(data) != min(length, int(total) - start):
            raise StoreUnavailable(f"{len(data)} of {length} bytes arrived", where=self._where(key), next="try again")
        return _Part(data=data, object_bytes=int(total), tag=str(said.get("ETag", "")))

    def _read_ranges(self, key: str, start: int, out: memoryview, **conditions: Any) -> None:
        """Fill `out` by several requests at once."""
        from concurrent.futures import ThreadPoolExecutor

        def fetch(at: int) -> None:
            part = out[at : at + _READ_BYTES]
            data = self._read(key, start + at, part.nbytes, **conditions).data
            if len(data) != part.nbytes:
                raise RangeMissing(f"the object ends at {start + at + len(data)}", where=self._where(key))
            part[:] = data

        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for _ in pool.map(fetch, range(0, out.nbytes, _READ_BYTES)):
                pass

    def _get_large(self, key: str, first: _Part) -> bytes:
        out = bytearray(first.object_bytes)
        out[: len(first.data)] = first.data
        rest = memoryview(out)[len(first.data) :]
        # All parts of one version: its tag is a condition of each request. Replaced meanwhile: StoreUnavailable.
        self._read_ranges(key, len(first.data), rest, IfMatch=first.tag)
        return bytes(out)

    def _pages(self, prefix: str) -> Iterator[ObjectInfo]:
        more: dict[str, Any] = {}
        while True:
            with self._errors(prefix, writing=False):
                page = self._call("list_objects_v2", Prefix=self._prefix + prefix, **more)
            for entry in page.get("Contents", ()):
                key = entry["Key"].removeprefix(self._prefix)
                if is_key(key):  # strangers and directory markers are left out
                    yield ObjectInfo(key=key, size=int(entry["Size"]))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    # ---- the client
    def _call(self, method: str, *, moved_bytes: int = 0, **arguments: object) -> Any:
        return self._system().call_s3(method, timeout=_deadline_s(moved_bytes), Bucket=self._bucket, **arguments)

    def _system(self) -> Any:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            # After a fork the event loop's thread is gone, and the sockets belong to the parent.
            if opened is not None:
                _abandoned.append(opened[1])
            opened = self._opened = (os.getpid(), _open_system(self._options))
        return opened[1]

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"

    @contextlib.contextmanager
    def _errors(self, key: str, *, writing: bool) -> Iterator[None]:
        import aiohttp
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (OSError, ValueError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            # Without the cause: a traceback would print the foreign error's text.
            raise typed(error, self._where(key), writing=writing) from None


_abandoned: list[Any] = []
"""A parent's file systems in a forked child: never used, never closed, for their sockets are the parent's."""


def _deadline_s(moved_bytes: int) -> float:
    return _BASE_DEADLINE_S + moved_bytes / _SLOWEST_BYTES_PER_S


def _open_system(options: Mapping[str, object]) -> Any:
    try:
        import s3fs
    except ImportError:
        raise StoreFailed(
            "S3 needs the package s3fs", next="pip install 'resilient-training[s3]', or another store"
        ) from None
    own = dict(options)
    given = own.pop("config_kwargs", None)
    config = {"max_pool_connections": 32, "retries": {"total_max_attempts": 1}, **_TIMEOUTS}
    config.update(given if isinstance(given, dict) else {})
    try:
        system = s3fs.S3FileSystem(**own, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
        system.retries = 1
        system.connect(timeout=_BASE_DEADLINE_S)  # builds the client, sends nothing
    except (TypeError, ValueError, KeyError) as error:
        raise StoreFailed(
            f"storage_options are not s3fs's ({type(error).__name__})", next="see s3fs's reference"
        ) from None
    return system
