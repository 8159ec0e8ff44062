"""A rank's connection to its node's keeper: hands over sealed snapshots, hears what becomes of them."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence

from resilient.checkpoint.items import Slot
from resilient.detect.progress import ProgressPage
from resilient.errors import KeeperLost, LoopMisused, TimedOut, WireError
from resilient.node.config import KeeperConfig
from resilient.node.messages import (
    Facts,
    SaveId,
    Value,
    decode_info,
    encode_facts,
    encode_slots,
    encode_values,
)
from resilient.node.pending import Pending
from resilient.node.wire import Channel, ChannelClosed, Json, Message
from storage.errors import ResilientError

_TICK_S = 1.0
_Outgoing = tuple[Json, bytes, tuple[int, ...]]


class KeeperClient:
    """One rank's side of the connection. Every method but `close` returns at once; they may be called by any thread.

    page   where this rank publishes its progress and reads decisions
    alive  whether the keeper is there; once false it stays so, and every Pending has failed with KeeperLost
    """

    def __init__(
        self,
        config: KeeperConfig,
        channel: Channel,
        page: ProgressPage,
        *,
        keeper_pid: int,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.config, self.page, self.alive = config, page, True
        self._channel, self._process = channel, process
        self._keeper = os.pidfd_open(keeper_pid)
        self._keeper_pid = keeper_pid
        self._lock = threading.Lock()
        self._pending: dict[SaveId, Pending] = {}
        self._reading: dict[SaveId, int] = {}  # saves whose snapshot the keeper may still read -> arena
        self._lost = threading.Event()
        self._why = ""
        self._closing = False
        # SimpleQueue.put may interrupt itself, so a signal handler can use it.
        self._outgoing: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        # Reading and writing get a socket object each: a time-out set for one must not cut the other short.
        self._writer_channel = Channel(channel.sock.dup())
        self._writer_channel.sock.settimeout(config.silence_s)
        self._threads = [
            threading.Thread(target=self._read, name="keeper-reader", daemon=True),
            threading.Thread(target=self._write, name="keeper-writer", daemon=True),
        ]
        _clients.add(self)
        for thread in self._threads:
            thread.start()

    # ---- handing over
    def attach(self, index: int, fd: int, nbytes: int) -> None:
        """Tell the keeper of the arena `index`, in place of the one that had this number. `fd` stays the caller's."""
        self._send({"t": "attach", "index": index, "nbytes": nbytes}, fds=(os.dup(fd),))

    def describe(self, plan_id: str, slots: Sequence[Slot]) -> None:
        """Tell the keeper how snapshots of this plan are laid out on this rank."""
        self._send({"t": "describe", "plan_id": plan_id}, encode_slots(slots))

    def seal(
        self,
        *,
        step: int,
        nonce: str,
        plan_id: str,
        arena: int,
        values: Sequence[Value] = (),
        members: int,
        layout: Mapping[str, int] | None = None,
        writers: int | None = None,
        restored: tuple[int, int] | None = None,
        source: str = "",
        formation: int = 0,
        replace: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> Pending:
        """The arena holds the whole snapshot of this rank; it must not change until `arena_free(arena)`.

        step, nonce  the same on all ranks; a nonce (16 hex digits) is used for one attempt only
        values       (name, rank or None, encoded bytes) that this rank hands over
        formation    counts the restores of this session: another one opens a generation of its own

        What goes wrong from here on, the Pending raises.
        """
        save = SaveId(step, nonce)
        facts = Facts(
            writers=self.config.nodes if writers is None else writers,
            members=members,
            layout=dict(layout or {}),
            restored=restored,
            source=source,
            formation=formation,
            replace=replace,
            metrics=dict(metrics or {}),
        )
        table, blob = encode_values(values)
        pending = Pending(save, hurry=self.hurry)
        with self._lock:
            if save in self._pending or save in self._reading:
                raise LoopMisused(f"step {step} was sealed twice with nonce {nonce}", next="draw a nonce per attempt")
            alive = self.alive
            if alive:
                self._pending[save], self._reading[save] = pending, arena
        if not alive:
            pending.fail(self._loss(save))
            return pending
        body = {"plan_id": plan_id, "arena": arena, "values": table, "facts": encode_facts(facts)}
        self._send(save.body("seal") | body, blob)
        return pending

    def void(self, step: int, nonce: str, error: ResilientError) -> None:
        """Give this save up on all ranks, with this error (a torn snapshot, say)."""
        self._send(SaveId(step, nonce).body("void") | {"error": error.to_wire()})

    def arena_free(self, index: int) -> bool:
        """Whether the keeper no longer reads this arena: it may be written again."""
        with self._lock:
            if index not in self._reading.values():
                return True
        return not self.alive and self._keeper_is_dead()

    def request(self, kind: str) -> None:
        """Ask for a decision ("save" or "stop") of all ranks; it comes through `page.decision_at`. Signal-safe."""
        self._outgoing.put(({"t": "request", "kind": kind}, b"", ()))

    def hurry(self) -> None:
        """Somebody waits: what is still to be encoded gets normal priority."""
        self._send({"t": "hurry"})

    def close(self, deadline_s: float = 60.0) -> None:
        """Let the keeper finish what is sealed, at most `deadline_s` seconds, and let go of it.

        The last rank of a node that closes ends the keeper. The rank that started it waits for its end within the
        same deadline; later than that the keeper ends by its own limit (`linger_s`).
        """
        until = time.monotonic() + deadline_s
        with self._lock:
            if self._closing:
                return
            pending = list(self._pending.values())
        for save in pending:
            if not save.wait(max(0.0, until - time.monotonic())):
                break
        self._closing = True
        self._send({"t": "bye"})
        self._outgoing.put(None)
        self._threads[1].join(max(0.1, until - time.monotonic()))
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, until - time.monotonic()))
        self._lose("this rank closed its connection")
        for thread in self._threads:
            thread.join(2 * _TICK_S)
        with contextlib.suppress(queue.Empty):
            while True:
                _close_all((self._outgoing.get_nowait() or ({}, b"", ()))[2])
        self._channel.close()
        self._writer_channel.close()
        os.close(self._keeper)
        self._keeper = -1
        self.page.close()

    def forget(self) -> None:
        """In a forked child: this connection is the parent's."""
        self.alive = False
        self._channel.sock.close()
        self._writer_channel.sock.close()

    # ---- threads
    def _send(self, body: Json, blob: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        if self.alive:
            self._outgoing.put((body, blob, fds))
        else:
            _close_all(fds)

    def _write(self) -> None:
        while (item := self._outgoing.get()) is not None:
            body, blob, fds = item
            try:
                if self.alive:
                    self._writer_channel.send(body, blob, fds)
            except (ChannelClosed, TimedOut) as error:
                self._lose(error.what)
            except WireError as error:  # too large a frame: this save fails, the connection is whole
                self._refuse(body, error)
            finally:
                _close_all(fds)

    def _read(self) -> None:
        beat, silent_s, channel = 0, 0.0, self._channel
        while not self._lost.is_set():
            try:
                message = channel.receive(_TICK_S)
                self._hear(message)
                silent_s = 0.0
            except TimedOut:
                # Counted in own ticks: when the whole machine was frozen, nobody is to blame.
                now = self.page.beat_ns()
                silent_s = 0.0 if now != beat else silent_s + _TICK_S
                beat = now
                if silent_s >= self.config.silence_s:
                    self._end_keeper()
                    self._lose(f"it showed no sign of life for {silent_s:g} s and was killed")
            except WireError as error:
                self._lose(error.what)

    def _hear(self, message: Message) -> None:
        kind = message.body.get("t")
        message.drop()
        if kind == "lost":
            self._lose(str(message.body.get("what", "")))
            return
        save = SaveId(message.number("step"), message.text("nonce"))
        with self._lock:
            pending = self._pending.get(save)
            if kind == "freed":
                self._reading.pop(save, None)
            if kind in ("done", "failed"):
                self._pending.pop(save, None)
        if pending is None:
            return
        if kind == "sealed":
            pending.mark_sealed()
        elif kind == "done":
            pending.succeed(decode_info(message.body.get("info")))
        elif kind == "failed":
            pending.fail(ResilientError.from_wire(message.body.get("error") or {}))

    def _refuse(self, body: Json, error: WireError) -> None:
        if body.get("t") != "seal":
            self._lose(error.what)
            return
        save = SaveId(body["step"], body["nonce"])
        self.void(save.step, save.nonce, error)
        with self._lock:
            pending = self._pending.pop(save, None)
            self._reading.pop(save, None)
        if pending is not None:
            pending.fail(error)

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._lost.is_set():
                return
            self.alive, self._why = False, why
            self._lost.set()
            lost, self._pending = self._pending, {}
        for save, pending in lost.items():
            pending.fail(self._loss(save))
        with contextlib.suppress(OSError):
            self._channel.sock.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(None)
        if self._process is not None:
            self._process.poll()  # so that a dead keeper does not stay a zombie

    def _loss(self, save: SaveId) -> KeeperLost:
        return KeeperLost(
            f"the keeper of node {self.config.node} (process {self._keeper_pid}) is gone: {self._why}",
            where=f"step {save.step}",
            next="the next save starts another keeper; whether this step was committed, the log says",
        )

    def _end_keeper(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self._keeper, signal.SIGKILL)

    def _keeper_is_dead(self) -> bool:
        if self._keeper < 0:
            return True
        poll = select.poll()
        poll.register(self._keeper, select.POLLIN)
        return bool(poll.poll(0))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


_clients: weakref.WeakSet[KeeperClient] = weakref.WeakSet()


def _forget_in_child() -> None:
    # A forked child (a DataLoader's worker) must not keep the connection of a dead rank open.
    for client in _clients:
        client.forget()


os.register_at_fork(after_in_child=_forget_in_child)
