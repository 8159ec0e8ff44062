"""Threads for work on chunks: results in order, few in flight, memory that is used again."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
R = TypeVar("R")

# The kernel gives memory of this size in huge pages; the same in small pieces costs more than encoding into it.
SLAB_BYTES = 64 << 20


class Scratch:
    """Memory of one thread that grows to the largest need and stays."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def view(self, name: str, nbytes: int) -> memoryview:
        """`nbytes` writable bytes; the next call with the same name gives the same memory."""
        held = self._held.get(name)
        if held is None or held.nbytes < nbytes:
            held = self._held[name] = np.empty(max(nbytes, 64 << 10), np.uint8)
        return held.data[:nbytes]


class Rooms:
    """Equal pieces of memory, lent and taken back; keep one for several saves so that it is touched first once."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self._free: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def borrow(self) -> npt.NDArray[np.uint8]:
        """One room."""
        with self._lock:
            if not self._free:
                slab = np.empty(max(SLAB_BYTES, self.room_bytes), np.uint8)
                count = slab.nbytes // self.room_bytes
                self._free = list(slab[: count * self.room_bytes].reshape(count, self.room_bytes))
            return self._free.pop()

    def give_back(self, rooms: Iterable[npt.NDArray[np.uint8]]) -> None:
        """They may be lent again."""
        with self._lock:
            self._free.extend(rooms)


class Lease:
    """Rooms lent for one piece of work; leaving it takes back what is still out, whatever became of the work."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._out: dict[int, npt.NDArray[np.uint8]] = {}

    def borrow(self) -> npt.NDArray[np.uint8]:
        """One room."""
        room = self._rooms.borrow()
        self._out[id(room)] = room
        return room

    def give_back(self, rooms: Iterable[npt.NDArray[np.uint8]]) -> None:
        """They may be lent again."""
        self._rooms.give_back([self._out.pop(id(room)) for room in rooms])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(list(self._out.values()))


class Pools:
    """Pools of threads at several priorities, made when first needed.

    An unprivileged thread that was made nice stays nice; who is in a hurry needs new threads.
    """

    def __init__(self, threads: int, niceness: Callable[[], int]) -> None:
        self._threads, self._niceness = threads, niceness
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in a thread of the niceness that is wanted now."""
        nice = self._niceness()
        if nice not in self._pools:
            self._pools[nice] = ThreadPoolExecutor(
                self._threads, thread_name_prefix=f"encode-{nice}", initializer=_set_niceness, initargs=(nice,)
            )
        return self._pools[nice].submit(function)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)


def _set_niceness(nice: int) -> None:
    if nice:
        # On Linux a thread has its own niceness. Below what the process has already it cannot go, and need not.
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


def in_order(pools: Pools, function: Callable[[T], R], items: Iterable[T], *, ahead: int) -> Iterator[R]:
    """`function` of each item, in the items' order, with at most `ahead` results begun and not yet taken."""
    begun: deque[Future[R]] = deque()
    for item in items:
        if len(begun) >= ahead:
            yield begun.popleft().result()
        begun.append(pools.submit(lambda item=item: function(item)))  # type: ignore[misc]
    while begun:
        yield begun.popleft().result()


def run_all(function: Callable[[T, Scratch], None], items: Iterable[T], *, threads: int) -> None:
    """`function` of each item and of its thread's memory; the first error ends it, once all threads are idle."""
    local = threading.local()

    def run(item: T) -> None:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch()
        function(item, local.scratch)

    with Pools(max(1, threads), lambda: 0) as pools:
        for _ in in_order(pools, run, items, ahead=2 * max(1, threads)):
            pass
