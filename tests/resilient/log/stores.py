"""Stores for the log's tests: one that counts, one that fails on command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from resilient.log import Ref, RunLog, Surroundings
from storage.memory import MemoryStore
from storage.store import Data, ObjectInfo, Store


class Watched(Store):
    """A memory store that records every operation, and lets `before` and `after` raise or act around a put."""

    conditional = True

    def __init__(self) -> None:
        self.inner = MemoryStore()
        self.url = "memory://watched"
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str], None] = lambda _: None
        self.after: Callable[[str], None] = lambda _: None

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        self.calls.append(("get", key))
        return self.inner.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        raise AssertionError("the log needs get, put and put_if_absent only")

    def size(self, key: str) -> int:
        raise AssertionError("the log needs get, put and put_if_absent only")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise AssertionError("the log trusts no listing")

    def delete(self, key: str) -> None:
        raise AssertionError("the log deletes nothing")

    def put(self, key: str, data: Data) -> None:
        self.calls.append(("put", key))
        self.before(key)
        self.inner.put(key, data)
        self.after(key)

    def put_if_absent(self, key: str, data: Data) -> None:
        self.calls.append(("put_if_absent", key))
        self.before(key)
        self.inner.put_if_absent(key, data)
        self.after(key)


class Clock:
    """Time that passes only in `sleep`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.numbers = count(1)

    def around(self, patience_s: float = 60.0) -> Surroundings:
        return Surroundings(
            patience_s=patience_s,
            clock_ns=lambda: int(self.now_s * 1e9),
            now_s=lambda: self.now_s,
            sleep=self._sleep,
            nonce=lambda: f"{next(self.numbers):016x}",
        )

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


def log_in(store: Store, *, base_every: int = 256, patience_s: float = 60.0) -> RunLog:
    """A log whose waits take no time and whose nonces are its own."""
    around = Surroundings(patience_s=patience_s, now_s=(clock := Clock()).around().now_s, sleep=clock._sleep)
    return RunLog(store, base_every=base_every, around=around, report=lambda _: None)


def ref(name: str) -> Ref:
    """A reference to a manifest of that name."""
    return Ref(key=f"data/{name}/manifest", hash="0" * 32, size=1)
