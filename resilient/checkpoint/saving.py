"""Save: agree, plan once per layout, copy into shared memory, hand over to the keeper."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import xxhash

from resilient.checkpoint import implied
from resilient.checkpoint.buffers import Buffers
from resilient.checkpoint.describe import decode_rank_state, encode_rank_state
from resilient.checkpoint.items import RankState, Slot, ValueInfo
from resilient.checkpoint.plan_save import check_values, fingerprint, plan_save
from resilient.checkpoint.retention import Keep
from resilient.checkpoint.snapshot import layout_slots
from resilient.checkpoint.state import Flat, flatten
from resilient.errors import LoopMisused, RanksDisagree, SaveSkipped, StepExists
from resilient.log.run_log import RunLog
from resilient.node.client import KeeperClient, KeeperConfig, Pending, connect
from resilient.node.messages import Value
from resilient.ranks import Ranks, reachable_host
from storage.url import redact

_log = logging.getLogger("resilient")
_63_BITS = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """How saves behave; the same on every rank."""

    url: str
    storage_options: Mapping[str, object]
    codec: str = "auto"
    keep: Keep | None = None
    when_busy: str = "wait"  # or "skip": what to do when every buffer is still being persisted
    buffers: int = 2  # snapshots in memory at once: one being written while another is being persisted
    threads: int = 1  # of the node's keeper
    busy_timeout_s: float = 3600.0


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What stays the same from save to save until the layout changes."""

    plan_id: str
    slots: tuple[Slot, ...]
    nbytes: int
    values: frozenset[tuple[str, int | None]]  # that this rank hands over
    placement: bytes


@dataclass(kw_only=True)
class _Session:
    """One life of the node's keeper, as this rank sees it."""

    client: KeeperClient
    nonce: str
    attempts: int = 0
    described: set[str] = field(default_factory=set)


class Saver:
    """Takes the snapshots of one rank; every method but `pending` ones is collective."""

    def __init__(self, ranks: Ranks, settings: SaveSettings, log: RunLog) -> None:
        self._ranks, self._settings, self._log = ranks, settings, log
        self._session: _Session | None = None
        self._buffers = Buffers(
            ranks,
            count=settings.buffers,
            skip=settings.when_busy == "skip",
            timeout_s=settings.busy_timeout_s,
            where=redact(settings.url),
        )
        self._last: Pending | None = None
        self._layout: _Layout | None = None
        self._fingerprint = ""
        self._restored: tuple[int, int] | None = None
        self._seen_slots: int | None = None
        self._formation = 0  # counts restores
        self._watched: list[Pending] = []  # saves since then that may have become commits
        self._nonces: set[str] = set()  # of this session's saves
        self._taken: set[int] | None = None  # steps that a save without replace=True must refuse
        self.stalled_s = 0.0  # how long the last `save` kept the loop

    # ---- the keeper
    @property
    def client(self) -> KeeperClient:
        """The connection to this node's keeper. Raises LoopMisused before `connect`."""
        if self._session is None:
            raise LoopMisused("there is no keeper yet", next="call connect() first")
        return self._session.client

    def connect(self) -> None:
        """Start the keeper (one per node) unless all ranks have one that lives. Collective."""
        alive = int(self._session is not None and self._session.client.alive)
        if self._ranks.agree([alive])[0][0]:
            return
        if self._session is not None:
            self._session.client.close(0.0)
        settings, place = self._settings, self._ranks.place
        if self._session is not None:
            if not alive:
                _log.warning("the keeper of node %d was lost (killed, out of memory?): starting another", place.node)
            self._seen_slots = self._ranks.on_rank_0(self._own_slots)
        host = "127.0.0.1" if place.nodes == 1 else self._ranks.on_rank_0(reachable_host)
        config = KeeperConfig(
            bind_host=host,
            torch_version=torch.__version__,
            url=settings.url,
            storage_options=dict(settings.storage_options),
            codec=settings.codec,
            keep=settings.keep,
            threads=settings.threads,
            rank=place.rank,
            world_size=place.size,
            node=place.node,
            nodes=place.nodes,
            local_rank=place.local_rank,
            local_size=place.local_size,
        )
        client = connect(config, self._ranks.exchange)
        nonce = self._ranks.broadcast(os.urandom(8).hex().encode()).decode()
        self._session = _Session(client=client, nonce=nonce)
        self._buffers.attach(client)

    def _own_slots(self) -> int | None:
        """Log slots that hold nothing but what this session knows: its own commits do not count as others'."""
        seen = self._seen_slots
        for commit in sorted(self._log.read().live, key=lambda commit: commit.slot) if seen is not None else ():
            if seen is not None and commit.slot >= seen:
                if commit.entry.nonce not in self._nonces:
                    break
                seen = commit.slot + 1
        return seen

    def restored_from(self, state: tuple[int, int] | None, seen_slots: int | None) -> None:
        """Later saves continue from this (generation, step), None from nothing: the run's line goes on from here.

        seen_slots  of the log when it was chosen: what others commit after that is not overruled
        """
        self._restored, self._seen_slots, self._taken = state, seen_slots, None
        self._watched.clear()
        self._formation += 1

    # ---- saving
    def save(self, step: int, state: Mapping[str, object], *, metrics: Mapping[str, float], replace: bool) -> Pending:
        """See Checkpointer.save."""
        begun_s = time.perf_counter()
        flat = flatten(state)
        self.connect()
        mine = self._describe(flat)
        taken = not replace and step in self._taken_steps()
        if self._agree(step, mine, state, replace=replace, taken=taken):
            raise StepExists(
                f"step {step} is committed already",
                where=redact(self._settings.url),
                next="use replace=True, or another step",
            )
        layout = self._layout
        assert layout is not None  # noqa: S101  (_agree has planned)
        index = self._buffers.take(layout.nbytes, self.client)
        if index is None:
            return Pending.failed(
                step,
                SaveSkipped(
                    f"step {step} was not saved: all {self._settings.buffers} buffers are still being written",
                    next='save less often, give more buffers, or use when_busy="wait"',
                ),
            )
        pending = self._hand_over(step, flat, layout, index, metrics=metrics, replace=replace)
        self.stalled_s = time.perf_counter() - begun_s
        return pending

    def settle(self) -> None:
        """Wait until no save is pending. Failures are left to who holds the Pending."""
        self._buffers.settle()

    def conclude(self) -> None:
        """Wait until no save is pending. Raises what the last one failed with, if nobody was told of it yet."""
        self.settle()
        if self._last is not None and not self._last.asked:
            self._last.result(0)

    def close(self, deadline_s: float = 60.0) -> None:
        """Let go of the keeper (it finishes what is sealed) and of the memory. Not collective."""
        if self._session is not None:
            self._session.client.close(deadline_s)
            self._session = None
        self._buffers.close()

    def _describe(self, flat: Flat) -> RankState:
        place = self._ranks.place
        own = [ValueInfo(name=name, digest="", rank=place.rank) for name in (implied.RNG, implied.PLACEMENT)]
        own += [ValueInfo(name=name, digest="", rank=place.rank) for name in flat.rank_values]
        shared = [ValueInfo(name=name, digest=_digest(data)) for name, data in flat.values.items()]
        return RankState(
            rank=place.rank,
            node=place.node,
            shards=tuple(item.shard for item in flat.tensors),
            values=(*shared, *own),
        )

    def _agree(self, step: int, mine: RankState, state: Mapping[str, object], *, replace: bool, taken: bool) -> bool:
        """Whether any rank knows this step to be committed; makes sure that all save the same, by the same plan.

        One small reduction; more is exchanged only where ranks differ or the layout has changed.
        """
        now = fingerprint(mine)
        changed = int(self._layout is None or now != self._fingerprint)
        low, high = self._ranks.agree([step, int(replace), _digest_of_shared(mine), changed, int(taken)])
        if low[:2] != high[:2]:
            raise RanksDisagree(
                f"rank {mine.rank} saves step {step}, the ranks save steps {low[0]} to {high[0]} "
                f"(replace: {low[1]} to {high[1]})",
                next="call save with the same step and the same replace on every rank",
            )
        if high[4] or (not high[3] and low[2] == high[2]):
            return bool(high[4])
        everyone = [decode_rank_state(data) for data in self._ranks.exchange(encode_rank_state(mine))]
        check_values(everyone)
        if high[3]:
            self._replan(everyone, now, state)
        return False

    def _replan(self, everyone: list[RankState], now: str, state: Mapping[str, object]) -> None:
        self.settle()  # the buffers are laid out anew: nobody may still be reading them
        plan, rank = plan_save(everyone), self._ranks.rank
        slots, nbytes = layout_slots(plan.shards[rank])
        self._layout = _Layout(
            plan_id=plan.fingerprint,
            slots=tuple(slots),
            nbytes=nbytes,
            values=frozenset(plan.values[rank]),
            placement=implied.placement(state),
        )
        self._fingerprint = now

    def _hand_over(
        self, step: int, flat: Flat, layout: _Layout, index: int, *, metrics: Mapping[str, float], replace: bool
    ) -> Pending:
        session = self._session
        if session is None:
            raise LoopMisused("there is no keeper yet", next="call connect() first")
        if layout.plan_id not in session.described:
            session.client.describe(layout.plan_id, layout.slots)
            session.described.add(layout.plan_id)
        rank = self._ranks.rank
        own = {**flat.rank_values, implied.RNG: implied.capture_rng(), implied.PLACEMENT: layout.placement}
        values: list[Value] = [
            (name, None, data) for name, data in flat.values.items() if (name, None) in layout.values
        ]
        values += [(name, rank, data) for name, data in own.items()]
        self._buffers.fill(index, layout.slots, flat.tensors)
        session.attempts += 1
        nonce = xxhash.xxh3_64_hexdigest(f"{session.nonce}/{session.attempts}".encode())
        self._nonces.add(nonce)
        pending = session.client.seal(
            step=step,
            nonce=nonce,
            plan_id=layout.plan_id,
            arena=index,
            values=values,
            members=self._ranks.size,
            layout={"ranks": self._ranks.size},
            restored=self._restored,
            restored_at=self._seen_slots,
            source=redact(self._settings.url) if self._restored else "",
            formation=self._formation,
            replace=replace,
            metrics=metrics,
        )
        self._last = pending
        self._buffers.use(index, pending)
        self._watched.append(pending)
        return pending

    def _taken_steps(self) -> set[int]:
        """Committed steps that stay on the run's line when this session saves; read once, then kept up."""
        if self._taken is None:
            steps = self._ranks.on_rank_0(lambda: [commit.step for commit in self._log.read().commits])
            self._taken = {step for step in steps if self._restored is None or step <= self._restored[1]}
        self._taken.update(pending.step for pending in self._watched if pending.commit is not None)
        self._watched = [pending for pending in self._watched if not pending.done()]
        return self._taken


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def _digest_of_shared(state: RankState) -> int:
    text = "".join(f"{value.name}\0{value.digest}\0" for value in state.values if value.rank is None)
    return _63_BITS & xxhash.xxh3_64_intdigest(text.encode())
