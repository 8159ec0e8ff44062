"""The coordinator among the keepers: collects seals and indexes, has them committed, has decisions voted on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from resilient.detect.decide import Kind, Proposer, Tell, Vote
from resilient.errors import WireError
from resilient.node.commit import Committer
from resilient.node.config import KeeperConfig
from resilient.node.coordinate import Action, Begin, Commit, Coordinator, Fail, Prepare
from resilient.node.loop import Lane, Loop
from resilient.node.messages import CommitInfo, SaveId, decode_facts
from resilient.node.persist import decode_written
from resilient.node.trace import Trace
from resilient.node.voting import answer_of, kind_of
from resilient.node.wire import Json, Message
from storage.errors import ResilientError

_TICK_S = 0.05


class Lead:
    """Runs in the keeper of rank 0's node. `tell(node, message)` reaches every node, its own too."""

    def __init__(
        self, loop: Loop, config: KeeperConfig, committer: Committer, *, tell: Callable[[int, Json], None], trace: Trace
    ) -> None:
        self._loop, self._config, self._committer, self._tell, self._trace = loop, config, committer, tell, trace
        self._coordinator = Coordinator(config.nodes, seal_timeout_s=config.seal_timeout_s)
        nodes = range(config.nodes)
        self._proposers: dict[Kind, Proposer] = {
            "save": Proposer(kind="save", nodes=set(nodes)),
            "stop": Proposer(kind="stop", nodes=set(nodes)),
        }
        self._lane = Lane(loop, "log")
        self._clean_up = Lane(loop, "clean-up")  # of its own, so that slow deletions delay no commit
        loop.every(_TICK_S, self._tick)
        if config.save_every_s is not None:
            loop.later(config.save_every_s, self._save_time)

    @property
    def busy(self) -> bool:
        """Whether saves or the log are under way."""
        return bool(self._coordinator.under_way) or self._lane.waiting + self._clean_up.waiting > 0

    # ---- what nodes say
    def hear(self, node: int, body: Json) -> None:
        """A message from a node. Raises WireError for what is none."""
        message, now_s = Message(body=body), time.monotonic()
        kind = body.get("t")
        if kind == "request":
            wish = kind_of(body)
            self._trace.event("request", kind=wish, node=node)
            self._spread(wish, self._proposers[wish].request(now_s))
        elif kind == "vote":
            vote = Vote(answer=answer_of(body), furthest=message.number("furthest"))
            self._spread(kind_of(body), self._proposers[kind_of(body)].vote(node, message.number("word"), vote, now_s))
        elif kind == "broken":
            self._proposers[kind_of(body)].broken(message.number("word"), now_s)
        else:
            self._hear_of_save(node, message, now_s)

    def _hear_of_save(self, node: int, message: Message, now_s: float) -> None:
        save, kind = SaveId(message.number("step"), message.text("nonce")), message.body.get("t")
        if kind == "sealed":
            self._act(self._coordinator.sealed(node, save, decode_facts(message.body.get("facts")), now_s))
        elif kind == "written":
            self._act(self._coordinator.written(node, save, decode_written(message.body.get("part"))))
        elif kind == "void":
            error = message.body.get("error")
            self._act(self._coordinator.void(save, ResilientError.from_wire(error if isinstance(error, dict) else {})))
        else:
            raise WireError(f"nodes do not say {str(kind)[:40]!r}")

    def lost(self, node: int, error: WireError) -> None:
        """A node's keeper is gone."""
        self._trace.event("node_lost", node=node, why=error.what)
        self._act(self._coordinator.lost(node, error))
        for kind, proposer in self._proposers.items():
            self._spread(kind, proposer.gone(node, time.monotonic()))

    # ---- what follows
    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Prepare):
                self._prepare(action)
            elif isinstance(action, Begin):
                self._everyone(action.save.body("begin") | {"generation": action.generation})
            elif isinstance(action, Commit):
                self._commit(action)
            else:
                self._fail(action)

    def _prepare(self, action: Prepare) -> None:
        save = action.save
        self._lane.submit(
            lambda: self._committer.prepare(save, action.facts),
            lambda generation: self._act(self._coordinator.prepared(save, generation)),
            lambda error: self._act(self._coordinator.fail(save, error)),
        )

    def _commit(self, action: Commit) -> None:
        save = action.save

        def committed(info: CommitInfo) -> None:
            self._coordinator.committed(save)
            self._everyone(save.body("done") | {"info": asdict(info)})
            self._clean_up.submit(self._committer.retain, lambda _: None, self._not_retained)

        self._lane.submit(
            lambda: self._committer.commit(action),
            committed,
            lambda error: self._act(self._coordinator.fail(save, error)),
        )

    def _fail(self, action: Fail) -> None:
        body = action.save.body("failed") | {"error": action.error.to_wire()}
        for node in action.nodes or range(self._config.nodes):
            self._tell(node, body)

    def _not_retained(self, error: ResilientError) -> None:
        # The commit stands; what should be gone is still there, and the next commit tries again.
        self._trace.event("not_retained", error=str(error))

    def _everyone(self, body: Json) -> None:
        for node in range(self._config.nodes):
            self._tell(node, body)

    def _spread(self, kind: Kind, tells: list[Tell]) -> None:
        for tell in tells:
            self._trace.event(tell.verb, kind=kind, step=tell.word >> 24)
            for node in tell.nodes:
                # Through the loop: the answer of the own node must not arrive within this call.
                body = {"t": tell.verb, "kind": kind, "word": tell.word}
                self._loop.post(partial(self._tell, node, body))

    def _save_time(self) -> None:
        if self._config.save_every_s is not None:
            self._spread("save", self._proposers["save"].request(time.monotonic()))
            self._loop.later(self._config.save_every_s, self._save_time)

    def _tick(self) -> None:
        now_s = time.monotonic()
        self._act(self._coordinator.tick(now_s))
        for kind, proposer in self._proposers.items():
            self._spread(kind, proposer.tick(now_s))
