"""Stores that fail on purpose, drawn from one seed."""

from __future__ import annotations

import random
from collections.abc import Iterator

from storage.errors import OutcomeUnknown, StoreUnavailable
from storage.store import Data, ObjectInfo, Store


class FlakyStore(Store):
    """Fails before doing what it was asked, or does it and loses the reply, each with a probability."""

    def __init__(self, inner: Store, seed: int, *, refuse: float = 0.0, lose_reply: float = 0.0) -> None:
        self.inner, self.url, self.conditional = inner, inner.url, inner.conditional
        self._draw = random.Random(seed)
        self._refuse, self._lose_reply = refuse, lose_reply
        self.faults = 0

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        self._before()
        return self.inner.get(key, max_bytes=max_bytes)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self._before()
        return self.inner.get_range(key, start, length)

    def size(self, key: str) -> int:
        self._before()
        return self.inner.size(key)

    def put(self, key: str, data: Data) -> None:
        self._before()
        self.inner.put(key, data)
        self._after()

    def put_if_absent(self, key: str, data: Data) -> None:
        self._before()
        self.inner.put_if_absent(key, data)
        self._after()

    def delete(self, key: str) -> None:
        self._before()
        self.inner.delete(key)
        self._after()

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        listing = self.inner.list(prefix)

        def breaking() -> Iterator[ObjectInfo]:
            for info in listing:
                self._before()
                yield info

        return breaking()

    def _before(self) -> None:
        if self._draw.random() < self._refuse:
            self.faults += 1
            raise StoreUnavailable("refused on purpose")

    def _after(self) -> None:
        if self._draw.random() < self._lose_reply:
            self.faults += 1
            raise OutcomeUnknown("reply lost on purpose")
