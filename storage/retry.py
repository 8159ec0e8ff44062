"""A store that tries again when the one inside fails in passing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type

from storage.errors import KeyExists, OutcomeUnknown, StoreError, StoreFailed, StoreUnavailable
from storage.store import Data, ObjectInfo, Store

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long and how often. Waits double from `first_wait_s` to `max_wait_s`, each cut by up to half at random."""

    first_wait_s: float = 0.1
    max_wait_s: float = 5.0
    deadline_s: float = 60.0  # no attempt begins later than this after the first one

    def __post_init__(self) -> None:
        if not (0 < self.first_wait_s <= self.max_wait_s and self.deadline_s >= 0):
            raise StoreFailed(f"{self} is not possible", next="0 < first_wait_s <= max_wait_s, 0 <= deadline_s")

    def wait_s(self, attempt: int, draw: random.Random) -> float:
        """Seconds to wait after attempt number `attempt` (from 1)."""
        longest = min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt - 1, 60))
        return longest * draw.uniform(0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt that failed in passing, for whoever keeps the journal."""

    operation: str
    key: str
    attempt: int  # from 1
    error: StoreUnavailable
    wait_s: float


class RetryingStore(Store):
    """Repeats what failed with StoreUnavailable or OutcomeUnknown until the policy's deadline, then raises it.

    A write one of whose attempts had an unknown outcome stays OutcomeUnknown, whatever later attempts say, unless
    one of them settles it: success, or KeyExists (the key holds other bytes, so ours are not there and can no longer
    come to be there).
    """

    def __init__(
        self,
        inner: Store,
        policy: RetryPolicy | None = None,
        *,
        draw: random.Random | None = None,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.monotonic,
        on_retry: Callable[[Attempt], None] | None = None,
    ) -> None:
        self.inner = inner
        self.url = inner.url
        self.conditional = inner.conditional
        self.policy = policy or RetryPolicy()
        self._draw = draw or random.Random()
        self._sleep, self._now_s, self._on_retry = sleep, now_s, on_retry

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """See Store.get."""
        return self._repeat("get", key, lambda: self.inner.get(key, max_bytes=max_bytes))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See Store.get_range."""
        return self._repeat("get_range", key, lambda: self.inner.get_range(key, start, length))

    def get_into(self, key: str, start: int, out: memoryview) -> None:
        """See Store.get_into."""
        self._repeat("get_into", key, lambda: self.inner.get_into(key, start, out))

    def size(self, key: str) -> int:
        """See Store.size."""
        return self._repeat("size", key, lambda: self.inner.size(key))

    def put(self, key: str, data: Data) -> None:
        """See Store.put."""
        self._write("put", key, lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: Data) -> None:
        """See Store.put_if_absent."""
        self._write("put_if_absent", key, lambda: self.inner.put_if_absent(key, data))

    def delete(self, key: str) -> None:
        """See Store.delete."""
        self._write("delete", key, lambda: self.inner.delete(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See Store.list. A listing that breaks off goes on after the last key that was given out."""
        return self._list(prefix, self.inner.list(prefix))

    def sweep_temporary(self, *, older_than_s: float) -> int:
        """See Store.sweep_temporary."""
        return self.inner.sweep_temporary(older_than_s=older_than_s)

    def close(self) -> None:
        """Close the store inside."""
        self.inner.close()

    def _repeat(self, operation: str, key: str, act: Callable[[], Result]) -> Result:
        begun_s = self._now_s()

        def too_late(state: RetryCallState) -> bool:
            # Also when the wait would end after the deadline: nobody is helped by sleeping first.
            return self._now_s() - begun_s + state.upcoming_sleep > self.policy.deadline_s

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if self._on_retry is not None and isinstance(error, StoreUnavailable):
                self._on_retry(
                    Attempt(
                        operation=operation,
                        key=key,
                        attempt=state.attempt_number,
                        error=error,
                        wait_s=state.upcoming_sleep,
                    )
                )

        return Retrying(
            sleep=self._sleep,
            stop=too_late,
            wait=lambda state: self.policy.wait_s(state.attempt_number, self._draw),
            retry=retry_if_exception_type(StoreUnavailable),
            before_sleep=tell,
            reraise=True,
        )(act)

    def _write(self, operation: str, key: str, act: Callable[[], None]) -> None:
        unknown: list[OutcomeUnknown] = []

        def noting() -> None:
            try:
                act()
            except OutcomeUnknown as error:
                unknown.append(error)
                raise

        try:
            self._repeat(operation, key, noting)
        except (OutcomeUnknown, KeyExists):
            raise
        except StoreError as error:
            if not unknown:
                raise
            raise OutcomeUnknown(
                f"an earlier attempt may have been carried out, and the last one failed: {error.what}",
                where=error.where,
                next="repeat it with the same bytes until it is known; then see to the cause",
            ) from error

    def _list(self, prefix: str, listing: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        last = ""

        def following() -> ObjectInfo | None:
            nonlocal listing
            try:
                return next((info for info in listing if info.key > last), None)
            except StoreUnavailable:
                listing = self.inner.list(prefix)  # an iterator that raised is finished
                raise

        while (info := self._repeat("list", prefix, following)) is not None:
            last = info.key
            yield info
