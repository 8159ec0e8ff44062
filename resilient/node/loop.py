"""The keeper's event loop: sockets, timers and results of threads, handled one at a time in one thread."""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from resilient.errors import WireError
from resilient.node.wire import Channel, ChannelClosed, Message
from storage.errors import ResilientError

T = TypeVar("T")
MAX_WAITING_BYTES = 64 << 20  # of one peer that does not read: it is dropped
_Call = Callable[[], None]


class Timer:
    """A call that is to come; `cancel` takes it back."""

    def __init__(self, call: _Call) -> None:
        self.call: _Call | None = call

    def cancel(self) -> None:
        """Do not call."""
        self.call = None


class Loop:
    """Runs handlers; all of them in the thread that called `run`, except that `post` may be used from anywhere."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._posted: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        self._writing: set[Channel] = set()
        self.stopped = False

    def post(self, call: _Call) -> None:
        """Have the loop make this call soon. Thread-safe."""
        self._posted.put(call)
        os.eventfd_write(self._wake, 1)

    def later(self, delay_s: float, call: _Call) -> Timer:
        """Have the loop make this call after `delay_s` seconds."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), timer))
        return timer

    def every(self, period_s: float, call: _Call) -> None:
        """Have the loop make this call now and then every `period_s` seconds, as far as it gets to it."""

        def again() -> None:
            call()
            self.later(period_s, again)

        again()

    def watch(self, fd: int, call: _Call) -> None:
        """Call whenever the descriptor is readable."""
        self._selector.register(fd, selectors.EVENT_READ, call)

    def unwatch(self, fd: int) -> None:
        """Do not call any more; no error if it was not watched."""
        if fd in self._selector.get_map():
            self._selector.unregister(fd)

    def add(self, channel: Channel, hear: Callable[[Message], None], lost: Callable[[WireError], None]) -> None:
        """Read the channel's messages; `lost` is called once, when it ends or says what it must not."""
        channel.sock.setblocking(False)
        self._selector.register(channel.sock, selectors.EVENT_READ, (channel, hear, lost))

    def rewire(self, channel: Channel, hear: Callable[[Message], None], lost: Callable[[WireError], None]) -> None:
        """From its next message on, the channel has other handlers."""
        key = self._selector.get_key(channel.sock)
        self._selector.modify(channel.sock, key.events, (channel, hear, lost))

    def drain(self, channel: Channel) -> None:
        """Handle what has already arrived, to the last byte. Raises nothing: what cannot be read is not there."""
        try:
            while not channel.closed and channel.feed():
                self._messages(channel)
        except WireError:
            pass  # the end, or no message: either way nothing more comes from here

    def remove(self, channel: Channel) -> None:
        """Forget the channel, and close it."""
        self._writing.discard(channel)
        if not channel.closed:
            self.unwatch(channel.sock.fileno())
            channel.close()

    def send(self, channel: Channel, body: Mapping[str, object], blob: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Send without waiting. A peer that is gone or takes nothing is noticed by its reader, not here."""
        if channel.closed:
            return
        try:
            channel.queue(dict(body), blob, fds)
            if not channel.flush():
                self._want_write(channel, wanted=True)
        except ChannelClosed:
            return  # reading will say so too
        if channel.waiting_bytes > MAX_WAITING_BYTES:
            channel.sock.shutdown(2)

    def run(self) -> None:
        """Handle events until `stopped`."""
        while not self.stopped:
            self._fire_timers()
            for key, events in self._selector.select(self._wait_s()):
                if key.data is None:
                    os.eventfd_read(self._wake)
                    self._run_posted()
                elif isinstance(key.data, tuple):
                    self._handle(key.data, events)
                else:
                    key.data()

    # ---- inside
    def _run_posted(self) -> None:
        for _ in range(self._posted.qsize()):
            self._posted.get_nowait()()

    def _wait_s(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _fire_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            _, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                timer.call()

    def _handle(
        self, data: tuple[Channel, Callable[[Message], None], Callable[[WireError], None]], events: int
    ) -> None:
        channel, _, lost = data
        if channel.closed:
            return  # by an earlier event of this round
        try:
            if events & selectors.EVENT_WRITE and channel.flush():
                self._want_write(channel, wanted=False)
            if events & selectors.EVENT_READ and channel.feed():
                self._messages(channel)
        except WireError as error:
            if not channel.closed:
                lost(error)

    def _messages(self, channel: Channel) -> None:
        # A message may change who hears the next one, or end the channel.
        while not channel.closed and (message := channel.next()) is not None:
            self._selector.get_key(channel.sock).data[1](message)

    def _want_write(self, channel: Channel, *, wanted: bool) -> None:
        if wanted != (channel in self._writing):
            (self._writing.add if wanted else self._writing.discard)(channel)
            key = self._selector.get_key(channel.sock)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            self._selector.modify(channel.sock, events, key.data)


class Lane:
    """One thread that does blocking work in order, and has the loop hear of each result."""

    def __init__(self, loop: Loop, name: str) -> None:
        self._loop, self._name = loop, name
        self._queue: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._started = False
        self.waiting = 0  # pieces of work whose end the loop has not heard of

    def submit(self, work: Callable[[], T], then: Callable[[T], None], fail: Callable[[ResilientError], None]) -> None:
        """Do `work` in the lane; then `then(result)`, or `fail(error)`, in the loop's thread."""

        def job() -> None:
            try:
                result = work()
            except ResilientError as error:
                failure = error
            except Exception as error:  # noqa: BLE001  (a defect must fail this save, and be told, not end the keeper)
                failure = unexpected(error)
            else:
                self._loop.post(lambda: self._end(lambda: then(result)))
                return
            self._loop.post(lambda: self._end(lambda: fail(failure)))

        self.waiting += 1
        self._queue.put(job)
        if not self._started:
            self._started = True
            threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _end(self, tell: _Call) -> None:
        self.waiting -= 1
        tell()

    def _work(self) -> None:
        while True:
            self._queue.get()()


def unexpected(error: BaseException) -> ResilientError:
    """An error that nobody foresaw, as one that can travel."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    place = f"{os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}" if at is not None else ""  # noqa: PTH119
    if isinstance(error, OSError) and error.errno is not None:
        return ResilientError(f"{type(error).__name__}: {error}", where=place)
    return ResilientError(f"{type(error).__name__}: {error}", where=place, next="this is a defect: report it")
