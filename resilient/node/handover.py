"""A rank's connection to its node's keeper: hands over sealed snapshots, hears what becomes of them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from resilient.checkpoint.items import Slot
from resilient.detect.progress import ProgressPage
from resilient.errors import KeeperLost, LoopMisused, WireError
from resilient.node.config import KeeperConfig
from resilient.node.line import Line
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
from resilient.node.wire import Channel, Json, Message
from storage.errors import ResilientError


class KeeperClient:
    """One rank's side of the connection. Every method but `close` returns at once; they may be called by any thread.

    page   where this rank publishes its progress and reads decisions
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
        """Takes over the channel and the page. Raises KeeperLost when the keeper is dead already."""
        self.config, self.page, self._process = config, page, process
        self._lock = threading.Lock()
        self._pending: dict[SaveId, Pending] = {}
        self._reading: dict[SaveId, int] = {}  # saves whose snapshot the keeper may still read -> arena
        self._why = ""
        self._closing = False
        self._line = Line(
            channel,
            keeper_pid,
            silence_s=config.silence_s,
            hear=self._hear,
            refused=self._refused,
            lost=self._lost,
            beat=page.beat_ns,
        )
        self._line.start()

    @property
    def alive(self) -> bool:
        """Whether the keeper is there; once false it stays so, and every Pending has failed with KeeperLost."""
        return self._line.alive

    @property
    def keeper_pid(self) -> int:
        """The keeper's process id."""
        return self._line.keeper_pid

    def wait_lost(self, deadline_s: float) -> bool:
        """Whether the keeper is gone, within the deadline."""
        return self._line.wait_lost(deadline_s)

    # ---- handing over
    def attach(self, index: int, fd: int, nbytes: int) -> None:
        """Tell the keeper of the arena `index`, in place of the one that had this number. `fd` stays the caller's."""
        self._line.send({"t": "attach", "index": index, "nbytes": nbytes}, fds=(os.dup(fd),))

    def describe(self, plan_id: str, slots: Sequence[Slot]) -> None:
        """Tell the keeper how snapshots of this plan are laid out on this rank."""
        self._line.send({"t": "describe", "plan_id": plan_id}, encode_slots(slots))

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
        restored_at: int | None = None,
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
            restored_at=restored_at,
            source=source,
            formation=formation,
            replace=replace,
            metrics=dict(metrics or {}),
        )
        table, blob = encode_values(values)
        body = {"plan_id": plan_id, "arena": arena, "values": table, "facts": encode_facts(facts)}
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
        self._line.send(save.body("seal") | body, blob)
        return pending

    def void(self, step: int, nonce: str, error: ResilientError) -> None:
        """Give this save up on all ranks, with this error (a torn snapshot, say)."""
        self._line.send(SaveId(step, nonce).body("void") | {"error": error.to_wire()})

    def arena_free(self, index: int) -> bool:
        """Whether the keeper no longer reads this arena: it may be written again."""
        with self._lock:
            if index not in self._reading.values():
                return True
        return not self.alive and self._line.keeper_is_dead()

    def request(self, kind: str) -> None:
        """Ask for a decision ("save" or "stop") of all ranks; it comes through `page.decision_at`. Signal-safe."""
        self._line.send({"t": "request", "kind": kind})

    def hurry(self) -> None:
        """Somebody waits: what is still to be encoded gets normal priority."""
        self._line.send({"t": "hurry"})

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
        self._line.say_last({"t": "bye"}, max(0.1, until - time.monotonic()))
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, until - time.monotonic()))
        self._line.end("this rank closed its connection")
        self._line.close()
        self.page.close()

    # ---- called by the line
    def _hear(self, message: Message) -> None:
        kind = message.body.get("t")
        message.drop()
        if kind == "lost":
            self._line.end(str(message.body.get("what", "")))
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

    def _refused(self, body: Json, error: WireError) -> None:
        if body.get("t") != "seal":
            self._line.end(error.what)
            return
        save = SaveId(body["step"], body["nonce"])
        self.void(save.step, save.nonce, error)
        with self._lock:
            pending = self._pending.pop(save, None)
            self._reading.pop(save, None)
        if pending is not None:
            pending.fail(error)

    def _lost(self, why: str) -> None:
        with self._lock:
            self._why = why
            lost, self._pending = self._pending, {}
        for save, pending in lost.items():
            pending.fail(self._loss(save))
        if self._process is not None:
            self._process.poll()  # so that a dead keeper does not stay a zombie

    def _loss(self, save: SaveId) -> KeeperLost:
        return KeeperLost(
            f"the keeper of node {self.config.node} (process {self.keeper_pid}) is gone: {self._why}",
            where=f"step {save.step}",
            next="the next save starts another keeper; whether this step was committed, the log says",
        )
