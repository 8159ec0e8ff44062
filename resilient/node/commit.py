"""The coordinator's hand in the run's log: leading, generations, commits, retention. Blocking."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from resilient.checkpoint.document import digest
from resilient.checkpoint.format import MAX_MANIFEST_BYTES, Manifest, data_prefix, decode_manifest, index_ref_of
from resilient.checkpoint.retention import Keep, to_drop
from resilient.errors import EpochUncertain, Fenced, StepExists
from resilient.log.entries import Ref, State
from resilient.log.run_log import Leader, RunLog
from resilient.node.config import KeeperConfig
from resilient.node.coordinate import Commit
from resilient.node.messages import CommitInfo, Facts, SaveId
from resilient.node.persist import OpenStore
from storage.errors import KeyMissing
from storage.failpoint import failpoint
from storage.probe import probe_put_if_absent


class Committer:
    """Appends for one session. Once fenced it refuses every later save: only a new session may lead again.

    `prepare` and `commit` are called by one thread, `retain` by another.
    """

    def __init__(self, config: KeeperConfig, store: OpenStore) -> None:
        self._config, self._store = config, store
        self._keep = _keep(config)
        self._leader: Leader | None = None
        self._generation: tuple[Any, int] | None = None  # what it was opened for, and its number
        self._fenced: Fenced | None = None
        self._seen: int | None = None  # log slots that a former leadership of ours has read

    def prepare(self, save: SaveId, facts: Facts) -> int:
        """Lead (at the first save), open a generation (at the first save, and after each restore); its number.

        Raises StepExists, Fenced, OffLine, StoreError.
        """
        leader = self._lead(facts)
        try:
            leader.refresh()
            key = (facts.formation, facts.restored, facts.members, tuple(sorted(facts.layout.items())))
            if self._generation is None or self._generation[0] != key:
                number = leader.open_generation(
                    members=facts.members,
                    layout=dict(facts.layout),
                    restored=_state(facts),
                    source=facts.source,
                )
                self._generation = (key, number)
        except Fenced as error:
            raise self._note(error) from error
        known = leader.view.find(save.step)
        if known is not None and not facts.replace:
            raise StepExists(
                f"step {save.step} is committed already (generation {known.generation})",
                where=self._config.where,
                next="use replace=True, or another step",
            )
        return self._generation[1]

    def commit(self, order: Commit) -> CommitInfo:
        """Manifest, then the commit entry. Raises SaveUnknown, Fenced, OffLine, CheckpointDamaged, StoreError."""
        from resilient.checkpoint.writer import put_manifest

        leader, save, facts = self._lead(order.facts), order.save, order.facts
        prefix = data_prefix(order.generation, save.step, save.nonce)
        opened = leader.view.opened(order.generation)
        manifest = Manifest(
            prefix=prefix,
            step=save.step,
            generation=order.generation,
            restore_step=None if opened is None or opened.restored is None else opened.restore_step,
            layout=facts.layout,
            world_size=facts.members,
            writers=tuple(sorted((index_ref_of(p.index, prefix=prefix) for p in order.parts), key=lambda r: r.writer)),
            metrics=facts.metrics,
            torch=self._config.torch_version,
            wall_ns=time.time_ns(),
        )
        ref = put_manifest(self._store.get(), manifest)
        try:
            slot = leader.commit(
                generation=order.generation,
                step=save.step,
                tier=self._config.tier,
                manifest=ref,
                metrics=facts.metrics,
                nonce=save.nonce,
            )
        except Fenced as error:
            raise self._note(error) from error
        return CommitInfo(
            step=save.step,
            generation=order.generation,
            slot=slot,
            manifest=ref.key,
            raw_bytes=manifest.raw_bytes,
            stored_bytes=manifest.stored_bytes,
            persist_s=max(part.persist_s for part in order.parts),
            total_s=time.monotonic() - order.began_s,
        )

    def retain(self) -> None:
        """Drop what `keep` does not keep and what was replaced, then delete its objects.

        Raises Fenced, StoreError: nothing is lost by it, the next commit tries again.
        """
        leader = self._leader
        if leader is None:
            return
        view = leader.view
        condemned = list(view.replaced)
        if self._keep is not None:
            steps = set(to_drop([(commit.step, commit.metrics) for commit in view.commits], self._keep))
            condemned += [commit for commit in view.commits if commit.step in steps]
            condemned += view.off_line
        refs = [commit.manifest for commit in condemned]
        if not refs:
            return
        failpoint("drop.before_entry")
        leader.drop(refs)
        for ref in refs:
            if leader.view.may_delete(ref):
                self._delete(ref)

    def _delete(self, ref: Ref) -> None:
        """Delete a dropped checkpoint, the manifest last: until then it says what is left."""
        store = self._store.get()
        try:
            data = store.get(ref.key, max_bytes=MAX_MANIFEST_BYTES)
        except KeyMissing:
            return
        keys: tuple[str, ...] = (ref.key,)
        if digest(data) == ref.hash:  # a damaged manifest says nothing that could be trusted
            keys = decode_manifest(data, key=ref.key).keys
        for key in keys:
            failpoint("drop.before_delete")
            store.delete(key)

    def _lead(self, facts: Facts) -> Leader:
        if self._fenced is not None:
            raise Fenced(self._fenced.what, where=self._fenced.where, next=self._fenced.next)
        if self._leader is None:
            # Alone on its node, a keeper is the only process that writes; with several the store must arbitrate.
            store = self._store.get()
            if store.conditional and self._config.tier == "object":
                probe_put_if_absent(store)  # some servers take the condition and ignore it
            log = RunLog(store, single_writer=self._config.nodes == 1)
            # What others committed since this session chose its state must not be undone by a job that wakes up late.
            seen = facts.restored_at if self._seen is None else self._seen
            self._leader = log.lead(f"{platform.node()}:{os.getpid()}", restored_at=seen)
            self._generation = None
        return self._leader

    def _note(self, error: Fenced) -> Fenced:
        if isinstance(error, EpochUncertain) and self._leader is not None:
            self._seen = self._leader.view.next_slot
            self._leader = None  # a damaged entry: the next save leads anew
        else:
            self._fenced = error
        return error


def _state(facts: Facts) -> State | None:
    return None if facts.restored is None else State(generation=facts.restored[0], step=facts.restored[1])


def _keep(config: KeeperConfig) -> Keep | None:
    return None if config.keep is None else Keep(**config.keep)
