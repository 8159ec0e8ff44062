"""A worker's line to its keeper: messages out through a queue, messages in to a handler, and its end noticed once."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Sequence

from resilient.errors import KeeperLost, TimedOut, WireError
from resilient.node.wire import Channel, ChannelClosed, Json, Message

_TICK_S = 1.0
_Outgoing = tuple[Json, bytes, tuple[int, ...]]


class Line:
    """Two threads and a socket. `send` never waits; every callback comes from one of the threads.

    hear(message)     what the keeper says
    refused(body, e)  a message was too large to be sent
    lost(why)         once: the keeper is gone, or `end` was called
    beat()            when the keeper last showed that it lives
    """

    def __init__(
        self,
        channel: Channel,
        keeper_pid: int,
        *,
        silence_s: float,
        hear: Callable[[Message], None],
        refused: Callable[[Json, WireError], None],
        lost: Callable[[str], None],
        beat: Callable[[], int],
    ) -> None:
        """Raises KeeperLost when the keeper is dead already."""
        self.keeper_pid, self.alive = keeper_pid, True
        self._channel, self._silence_s = channel, silence_s
        self._hear, self._refused, self._lost, self._beat = hear, refused, lost, beat
        try:
            self._keeper = os.pidfd_open(keeper_pid)
        except OSError as error:
            raise KeeperLost(f"the keeper (process {keeper_pid}) has just died: {error}") from error
        self._lock = threading.Lock()
        self._over = threading.Event()
        # SimpleQueue.put may interrupt itself, so a signal handler can use it.
        self._outgoing: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        # Reading and writing get a socket object each: a time-out set for one must not cut the other short.
        self._out = Channel(channel.sock.dup())
        self._out.sock.settimeout(silence_s)
        self._reader = threading.Thread(target=self._read, name="keeper-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="keeper-writer", daemon=True)
        _lines.add(self)

    def start(self) -> None:
        """Begin to read and write."""
        self._reader.start()
        self._writer.start()

    def send(self, body: Json, blob: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Have it sent; takes over the descriptors. On a line that is lost it does nothing."""
        if self.alive:
            self._outgoing.put((body, blob, fds))
        else:
            _close_all(fds)

    def wait_lost(self, deadline_s: float) -> bool:
        """Whether the line is lost, within the deadline."""
        return self._over.wait(deadline_s)

    def keeper_is_dead(self) -> bool:
        """Whether the process has ended: then nothing reads our memory any more."""
        if self._keeper < 0:
            return True
        poll = select.poll()
        poll.register(self._keeper, select.POLLIN)
        return bool(poll.poll(0))

    def say_last(self, body: Json, deadline_s: float) -> None:
        """Send this after everything else, and wait until it is out."""
        self.send(body)
        self._outgoing.put(None)
        self._writer.join(deadline_s)

    def end(self, why: str) -> None:
        """The line is over; tells `lost` if it was not before."""
        with self._lock:
            if self._over.is_set():
                return
            self.alive = False
            self._over.set()
        self._lost(why)
        with contextlib.suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(None)

    def close(self) -> None:
        """Give everything back. Call `end` before, and not from a callback."""
        self._reader.join(2 * _TICK_S)
        self._writer.join(2 * _TICK_S)
        with contextlib.suppress(queue.Empty):
            while True:
                _close_all((self._outgoing.get_nowait() or ({}, b"", ()))[2])
        self._channel.close()
        self._out.close()
        os.close(self._keeper)
        self._keeper = -1

    def forget(self) -> None:
        """In a forked child: this line is the parent's."""
        self.alive = False
        self._channel.sock.close()
        self._out.sock.close()

    def _write(self) -> None:
        while (item := self._outgoing.get()) is not None:
            body, blob, fds = item
            try:
                if self.alive:
                    self._out.send(body, blob, fds)
            except (ChannelClosed, TimedOut) as error:
                self.end(error.what)
            except WireError as error:  # too large a frame; nothing of it was sent
                self._refused(body, error)
            except BaseException as error:
                # A defect: whoever waits for an answer must hear of it, since no thread is left to send.
                self.end(f"its sender failed: {error!r}")
                raise
            finally:
                _close_all(fds)

    def _read(self) -> None:
        beat, silent_s = 0, 0.0
        while self.alive:
            try:
                self._hear(self._channel.receive(_TICK_S))
                silent_s = 0.0
            except TimedOut:
                # Counted in own ticks: when the whole machine was frozen, nobody is to blame.
                now = self._beat()
                silent_s = 0.0 if now != beat else silent_s + _TICK_S
                beat = now
                if silent_s >= self._silence_s:
                    self._kill_keeper()
                    self.end(f"it showed no sign of life for {silent_s:g} s and was killed")
            except WireError as error:
                self.end(error.what)

    def _kill_keeper(self) -> None:
        # It may wake up later and read memory that is being written again: only its death makes that safe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._keeper, signal.SIGKILL)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


_lines: weakref.WeakSet[Line] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child (a DataLoader's worker) must not keep the connection of a dead rank open.
    for line in _lines:
        line.forget()


os.register_at_fork(after_in_child=_forget_in_child)
