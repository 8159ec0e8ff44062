"""The keeper of one node: takes its workers' seals, writes their snapshots, passes outcomes on."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.items import Slot
from resilient.detect import decide
from resilient.detect.progress import KeeperPage
from resilient.errors import SaveFailed, SaveUnknown, WireError
from resilient.node.arena import MappedArena
from resilient.node.config import KeeperConfig
from resilient.node.coordinate import Written
from resilient.node.gather import Gathering, Sealed, Void, Whole
from resilient.node.loop import Lane, Loop
from resilient.node.members import Members
from resilient.node.messages import (
    SaveId,
    check_slots,
    decode_facts,
    decode_slots,
    decode_values,
    encode_facts,
)
from resilient.node.persist import Persist, WriteOrder, encode_written
from resilient.node.trace import Trace
from resilient.node.voting import Voting, kind_of
from resilient.node.wire import Json, Message
from storage.errors import ResilientError
from storage.failpoint import failpoint

_PLANS_KEPT = 8  # per rank; a rank seals by its newest plan
_BEAT_S = 0.5
LOW_NICE = 10  # beside busy ranks: at 19 a keeper hardly runs at all, at 0 it takes from the step


@dataclass
class _Save:
    parts: dict[int, Sealed]
    cancelled: threading.Event = field(default_factory=threading.Event)
    writing: bool = False
    over: bool = False


class NodeKeeper:
    """One node's saves and decisions. `up` sends to the coordinator; `down` is called with what it says."""

    def __init__(self, loop: Loop, config: KeeperConfig, *, token: str, persist: Persist, trace: Trace) -> None:
        self._loop, self._config, self._persist, self._trace = loop, config, persist, trace
        self.page = KeeperPage(config.local_size)
        self.members = Members(loop, config, token=token, page=self.page, hear=self._hear, gone=self._gone)
        self.up: Callable[[Json], None] = lambda _: None
        self._voting = Voting(loop, self.page, self.members, alone=config.nodes == 1, answer=lambda body: self.up(body))
        self._gathering = Gathering(self.members.ranks, seal_timeout_s=config.seal_timeout_s)
        self._arenas: dict[tuple[int, int], MappedArena] = {}
        self._plans: OrderedDict[tuple[int, str], tuple[Slot, ...]] = OrderedDict()
        self._saves: dict[SaveId, _Save] = {}
        self._hurried = False  # somebody waits for a save
        self._lane = Lane(loop, "persist")
        loop.every(_BEAT_S, self._tick)

    @property
    def busy(self) -> bool:
        """Whether sealed saves are not over yet."""
        return bool(self._saves) or self._lane.waiting > 0

    # ---- what workers say
    def _hear(self, local: int, message: Message) -> None:
        kind = message.body.get("t")
        if kind == "attach":
            self._attach(local, message)
            return
        message.drop()
        if kind == "seal":
            self._seal(local, message)
        elif kind == "describe":
            self._plans[local, message.text("plan_id")] = decode_slots(message.blob)
            mine = [key for key in self._plans if key[0] == local]
            for key in mine[:-_PLANS_KEPT]:
                del self._plans[key]
        elif kind == "void":
            save = SaveId(message.number("step"), message.text("nonce"))
            self._act(self._gathering.void(save, ResilientError.from_wire(_error(message.body))))
        elif kind == "request":
            self.up({"t": "request", "kind": kind_of(message.body)})
        elif kind == "hurry":
            self._hurried = bool(self._saves or self._gathering.waiting)
        else:
            raise WireError(f"workers do not say {str(kind)[:40]!r}")

    def _attach(self, local: int, message: Message) -> None:
        if len(message.fds) != 1:
            message.drop()
            raise WireError(f"{len(message.fds)} descriptors came for one arena")
        if not self._arenas:  # a save is near: the first one should not pay for imports
            self._lane.submit(self._persist.warm, lambda _: None, lambda _: None)
        index = message.number("index")
        # The one before is unmapped when the last save that reads it is over.
        self._arenas[local, index] = MappedArena(message.fds[0], message.number("nbytes"))

    def _seal(self, local: int, message: Message) -> None:
        save = SaveId(message.number("step"), message.text("nonce"))
        try:
            part = self._part(local, message)
            results = self._gathering.seal(local, save, part, time.monotonic())
        except WireError as error:
            results = self._gathering.void(save, error)
        if any(isinstance(result, Void) and result.save == save for result in results):
            self.members.tell(local, save.body("freed"))
        self._act(results)

    def _part(self, local: int, message: Message) -> Sealed:
        body = message.body
        plan, arena = (local, message.text("plan_id")), self._arenas.get((local, message.number("arena")))
        if plan not in self._plans or arena is None:
            raise WireError(f"local rank {local} seals by a plan or an arena that it has not handed over")
        check_slots(self._plans[plan], arena.nbytes)
        return Sealed(
            facts=decode_facts(body.get("facts")),
            memory=arena.view,
            slots=self._plans[plan],
            values=decode_values(body.get("values"), message.blob),
        )

    def _gone(self, local: int, why: str) -> None:
        self._trace.event("worker_gone", local_rank=local, why=why)
        for key in [key for key in self._arenas if key[0] == local]:
            del self._arenas[key]
        self._act(self._gathering.gone(local, why))

    # ---- what follows
    def _act(self, results: list[Whole | Void]) -> None:
        for result in results:
            if isinstance(result, Whole):
                self._whole(result)
            else:
                self.up(result.save.body("void") | {"error": result.error.to_wire()})
                self._over(result.save, result.save.body("failed") | {"error": result.error.to_wire()})

    def _whole(self, whole: Whole) -> None:
        save = whole.save
        self._saves[save] = _Save(parts=dict(whole.parts))
        self._trace.event("sealed", step=save.step, nonce=save.nonce)
        self.members.tell_all(save.body("sealed"))
        try:
            failpoint("keeper.sealed")
        except ResilientError as error:
            self.up(save.body("void") | {"error": error.to_wire()})
            return
        self.up(save.body("sealed") | {"facts": encode_facts(whole.parts[0].facts)})

    def _begin(self, save: SaveId, generation: int) -> None:
        entry = self._saves.get(save)
        if entry is None or entry.over:
            return
        entry.writing = True
        order = WriteOrder(
            save=save,
            generation=generation,
            parts=tuple(entry.parts[local] for local in sorted(entry.parts)),
            cancelled=entry.cancelled.is_set,
            niceness=lambda: 0 if self._hurried else LOW_NICE,
        )
        self._lane.submit(
            lambda: self._persist.write(order),
            lambda written: self._written(save, entry, written),
            lambda error: self._not_written(save, entry, error),
        )

    def _written(self, save: SaveId, entry: _Save, written: Written) -> None:
        self._trace.event("written", step=save.step, nonce=save.nonce, **encode_written(written)["numbers"])
        self._free(save, entry)
        if not entry.over:
            self.up(save.body("written") | {"part": encode_written(written)})

    def _not_written(self, save: SaveId, entry: _Save, error: ResilientError) -> None:
        self._trace.event("not_written", step=save.step, nonce=save.nonce, error=str(error))
        self._free(save, entry)
        if not entry.over:
            self.up(save.body("void") | {"error": error.to_wire()})

    def _free(self, save: SaveId, entry: _Save) -> None:
        entry.writing = False
        entry.parts = {}
        if entry.over:
            self._saves.pop(save, None)
        self.members.tell_all(save.body("freed"))

    def _over(self, save: SaveId, body: Json) -> None:
        """Tell the workers how a save ended. Its memory is theirs again only when no thread reads it any more."""
        self._trace.event(str(body["t"]), **{key: value for key, value in body.items() if key != "t"})
        entry = self._saves.get(save)
        if entry is not None:
            entry.over = True
            entry.cancelled.set()
        if entry is None or not entry.writing:
            self._saves.pop(save, None)
            self.members.tell_all(save.body("freed"))
        self.members.tell_all(body)
        if not self._saves:
            self._hurried = False

    # ---- what the coordinator says
    def down(self, body: Json) -> None:
        """A message from the coordinator. Raises WireError for what is none."""
        message = Message(body=body)
        kind = body.get("t")
        if kind == "begin":
            self._begin(_save_of(message), message.number("generation"))
        elif kind == "done":
            self._over(_save_of(message), body)
        elif kind == "failed":
            save = _save_of(message)
            self._gathering.void(save, ResilientError.from_wire(_error(body)))  # for who has yet to seal it
            self._over(save, body)
        elif kind == "propose":
            self._voting.propose(kind_of(body), message.number("word"))
        elif kind in ("confirm", "revoke"):
            state = decide.CONFIRMED if kind == "confirm" else decide.REVOKED
            self._voting.conclude(kind_of(body), message.number("word"), state)
        else:
            raise WireError(f"coordinators do not say {str(kind)[:40]!r}")

    def abandon(self, why: str) -> None:
        """The coordinator is gone, or this keeper must end: no save will be heard of any more."""
        for save, entry in list(self._saves.items()):
            if not entry.over:
                error = SaveUnknown(
                    f"step {save.step}: {why}",
                    next="read the log: the step is there if it was committed",
                )
                self._over(save, save.body("failed") | {"error": error.to_wire()})
        for save in self._gathering.waiting:
            self._act(self._gathering.void(save, SaveFailed(f"step {save.step}: {why}")))

    def _tick(self) -> None:
        self.page.beat()
        self._act(self._gathering.tick(time.monotonic()))


def _save_of(message: Message) -> SaveId:
    return SaveId(message.number("step"), message.text("nonce"))


def _error(body: Json) -> dict[str, Any]:
    error = body.get("error")
    return error if isinstance(error, dict) else {}
