"""Restore: one step chosen for all ranks, verified bytes read into the live state, older steps where one is damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from resilient.bar import shown_progress
from resilient.checkpoint.implied import Implied, restore_implied, same_layout
from resilient.checkpoint.plan_load import plan_load
from resilient.checkpoint.reader import Checkpoint, open_checkpoint
from resilient.checkpoint.state import as_outputs, prepare
from resilient.errors import CheckpointDamaged, FormatUnsupported, NoCheckpoint
from resilient.log.entries import Ref
from resilient.log.run_log import RunLog
from resilient.log.view import LogView
from resilient.ranks import Ranks
from storage.errors import KeyMissing, RangeMissing, ResilientError, TooLarge
from storage.store import Store

_log = logging.getLogger("resilient")
Only = str | Sequence[str] | None

DAMAGE = (CheckpointDamaged, FormatUnsupported, KeyMissing, RangeMissing, TooLarge)
"""Errors that say "this step cannot be read": an older one may do. All others end the restore."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was restored."""

    step: int  # completed steps, so the next to run
    generation: int
    left_out: tuple[str, ...] = ()  # with strict=False: names without a partner, each said why
    skipped: tuple[int, ...] = ()  # newer steps that were damaged, newest first


@dataclass(frozen=True, kw_only=True)
class _Choice:
    step: int
    generation: int
    manifest: Ref


class Restorer:
    """Restores the state of all ranks from one store; every method is collective."""

    def __init__(self, ranks: Ranks, store: Store, log: RunLog, *, threads: int) -> None:
        self._ranks, self._store, self._log, self._threads = ranks, store, log, threads
        self.seen_slots: int | None = None  # of the log, when what was restored last was chosen

    def steps(self) -> list[int]:
        """Committed steps, ascending, the same on all ranks."""
        return list(self._ranks.on_rank_0(lambda: [commit.step for commit in self._log.read().commits]))

    def restore(
        self, state: Mapping[str, object], *, step: int | None, only: Only, strict: bool, randomness: bool
    ) -> Restored | None:
        """Restore `step`, or the newest that is whole; None where the run has no commit at all.

        Plain values are applied only after every rank has verified every byte of its own.
        Raises NoCheckpoint (that step is not there), CheckpointDamaged (nothing whole is left), StateMismatch,
        StoreError, PeerLost.
        """
        damaged: dict[tuple[int, int], ResilientError] = {}
        while (choice := self._choose(step, damaged)) is not None:
            try:
                restored = self._load(choice, state, only, strict, randomness and only is None)
            except DAMAGE as error:
                if step is not None:
                    raise
                damaged[choice.generation, choice.step] = error
                self._announce(f"step {choice.step} cannot be restored, trying an older one: {error}")
                continue
            skipped = tuple(sorted((newer for _, newer in damaged), reverse=True))
            if skipped:
                self._announce(f"restored step {restored.step}; newer steps {list(skipped)} are damaged")
            return replace(restored, skipped=skipped)
        if damaged:
            raise _nothing_whole(damaged, self._store.url)
        return None

    def _choose(self, step: int | None, damaged: Mapping[tuple[int, int], object]) -> _Choice | None:
        found, self.seen_slots = self._ranks.on_rank_0(lambda: _pick(self._log.read(), step, damaged))
        if found is None and step is not None:
            raise NoCheckpoint(
                f"step {step} is not committed (or was dropped by retention)",
                where=self._store.url,
                next="`resilient ls` lists the steps; step=None takes the newest",
            )
        if found is None:
            return None
        generation, chosen, key, digest, size = found
        return _Choice(step=chosen, generation=generation, manifest=Ref(key=key, hash=digest, size=size))

    def _load(
        self, choice: _Choice, state: Mapping[str, object], only: Only, strict: bool, randomness: bool
    ) -> Restored:
        opened: list[tuple[Checkpoint, Implied]] = []

        def open_it() -> bool:
            checkpoint = open_checkpoint(self._store, choice.manifest)
            implied = Implied.of(checkpoint.values(), self._ranks.rank)
            opened.append((checkpoint, implied))
            return same_layout(implied, checkpoint.manifest.world_size, state, self._ranks.size)

        same = all(self._ranks.together(open_it))
        checkpoint, implied = opened[0]
        finishers: list[Callable[[], None]] = []
        left_out: list[str] = []

        def read_it() -> None:
            stored = checkpoint.stored()
            restoration = prepare(
                state,
                {name: tensor.info for name, tensor in stored.items()},
                implied.others,
                only=only,
                strict=strict,
                rank=self._ranks.rank,
                same_layout=same,
            )
            left_out.extend(restoration.left_out)
            outputs = as_outputs(restoration.wanted)
            plan = plan_load(stored, [item.shard for item in restoration.wanted])
            with shown_progress(plan.wanted_bytes, f"restoring step {choice.step}", show=self._ranks.rank == 0) as tell:
                checkpoint.load(plan, outputs.arrays, threads=self._threads, progress=tell)
            finishers.extend((outputs.finish, restoration.finish))

        self._ranks.together(read_it)
        for finish in finishers:
            finish()
        if randomness:
            restore_implied(implied, step=choice.step, rank=self._ranks.rank, same_layout=same)
        return Restored(step=choice.step, generation=choice.generation, left_out=tuple(left_out))

    def _announce(self, text: str) -> None:
        if self._ranks.rank == 0:
            _log.warning("%s", text)


def _pick(
    view: LogView, step: int | None, damaged: Mapping[tuple[int, int], object]
) -> tuple[tuple[int, int, str, str, int] | None, int]:
    """The commit to restore as JSON values (generation, step, manifest key, hash, size), and the slots read."""
    for commit in reversed(view.commits):
        if (commit.generation, commit.step) not in damaged and step in (None, commit.step):
            ref = commit.manifest
            return (commit.generation, commit.step, ref.key, ref.hash, ref.size), view.next_slot
    return None, view.next_slot


def _nothing_whole(damaged: Mapping[tuple[int, int], ResilientError], url: str) -> CheckpointDamaged:
    steps = ", ".join(f"{step} ({error.what})" for (_, step), error in damaged.items())
    return CheckpointDamaged(
        f"none of the {len(damaged)} committed steps can be read: {steps}",
        where=url,
        next="`resilient verify --deep` names each damaged object; restore them from a copy of the store",
    )
