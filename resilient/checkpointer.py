"""Save and restore by hand: the explicit form of what `resilient.context` does at step boundaries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from resilient.checkpoint.arguments import check_metrics, check_step
from resilient.checkpoint.restoring import Restored, Restorer
from resilient.checkpoint.retention import Keep
from resilient.checkpoint.saving import Saver, SaveSettings
from resilient.detect.progress import ProgressPage
from resilient.errors import LoopMisused
from resilient.log.run_log import RunLog
from resilient.node.client import Pending
from resilient.ranks import Ranks
from storage.open import open_store

CODECS = ("auto", "raw", "fast")


class Checkpointer:
    """Checkpoints of one run at `url`. `save`, `restore`, `close` (and making one) are collective.

    url              path or fsspec URL
    keep             retention: which committed steps stay; None keeps all
    codec            "auto", "raw" or "fast" (lossless)
    storage_options  fsspec's
    when_busy        "wait" or "skip": what `save` does while every buffer is still being written
    buffers          snapshots in host memory at once, per rank
    threads          how many threads read and decode at a restore (and encode at a save, per node)
    collective_timeout_s  how long a rank waits for its peers

    Raises StoreError where the store cannot be opened.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: Keep | None = None,
        codec: str = "auto",
        storage_options: Mapping[str, object] | None = None,
        when_busy: str = "wait",
        buffers: int = 2,
        threads: int | None = None,
        collective_timeout_s: float = 600.0,
    ) -> None:
        if codec not in CODECS or when_busy not in ("wait", "skip") or buffers < 1:
            raise LoopMisused(
                f"codec={codec!r}, when_busy={when_busy!r}, buffers={buffers}",
                next='codec is "auto", "raw" or "fast"; when_busy "wait" or "skip"; buffers at least 1',
            )
        self.url = os.fspath(url)
        options = dict(storage_options or {})
        self._store = open_store(self.url, options)
        self.ranks = Ranks(timeout_s=collective_timeout_s)
        self._log = RunLog(self._store)
        local = self.ranks.place.local_size
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // local)
        self._restorer = Restorer(self.ranks, self._store, self._log, threads=self._threads)
        self.last_restored: Restored | None = None
        self._closed = False
        self._saver = Saver(
            self.ranks,
            SaveSettings(
                url=self.url,
                storage_options=options,
                codec=codec,
                keep=keep,
                when_busy=when_busy,
                buffers=buffers,
                threads=max(1, self._threads * local),
            ),
            self._log,
        )

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, float] | None = None,
        replace: bool = False,
    ) -> Pending:
        """Copy the state of this moment and return; the keeper writes and commits it in the background.

        step     completed steps; the same on every rank
        metrics  numbers kept with the step (rank 0's count), e.g. for Keep(best=..., by=...)

        Raises StepExists, RanksDisagree, ValuesDiffer, StateInvalid, SettingInvalid (step or metrics), PeerLost; what
        fails later, the Pending raises.
        """
        self._check_open()
        numbers = check_metrics(metrics or {})
        return self._saver.save(check_step(step), state, metrics=numbers, replace=bool(replace))

    def restore(
        self,
        state: Mapping[str, object],
        step: int | None = None,
        only: str | Sequence[str] | None = None,
        strict: bool = True,
        *,
        randomness: bool = True,
    ) -> int | None:
        """Restore a committed step (the newest that is whole, by default) into `state`; None if there is none.

        only        an entry of `state` or patterns of names; then random numbers are left as they are
        strict      names that are missing on either side are an error, else `last_restored.left_out` lists them
        randomness  whether random number generators are restored too

        Raises NoCheckpoint, CheckpointDamaged, StateMismatch, StoreError, PeerLost.
        """
        self._check_open()
        self._saver.settle()
        restored = self._restorer.restore(state, step=step, only=only, strict=strict, randomness=randomness)
        self.last_restored = restored
        source = None if restored is None else (restored.generation, restored.step)
        self._saver.restored_from(source, self._restorer.seen_slots)
        return None if restored is None else restored.step

    def steps(self) -> list[int]:
        """Committed steps, ascending. Collective."""
        self._check_open()
        return self._restorer.steps()

    # ---- what a Run needs
    @property
    def page(self) -> ProgressPage:
        """Where this rank publishes its progress and reads decisions. Raises LoopMisused before `connect`."""
        return self._saver.client.page

    def connect(self) -> None:
        """Make sure that every node has a keeper, started now if need be. Collective."""
        self._saver.connect()

    def ask(self, kind: str) -> None:
        """Ask for a "save" or a "stop" of all ranks; it comes through `page.decision_at`."""
        self._saver.client.request(kind)

    @property
    def stalled_s(self) -> float:
        """How long the last `save` kept its caller."""
        return self._saver.stalled_s

    def hurry(self) -> None:
        """Somebody waits for what is being written."""
        self._saver.client.hurry()

    def close(self, deadline_s: float = 60.0) -> None:
        """Let the keeper finish what is sealed, waiting at most `deadline_s` seconds, and let go. Collective.

        A save that failed without anybody asking its Pending is told here only by the context manager's exit.
        """
        if self._closed:
            return
        self._closed = True
        self._saver.close(deadline_s)
        self.ranks.close()
        self._store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LoopMisused("this checkpointer is closed", next="make a new resilient.Checkpointer(...)")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._saver.conclude()
        finally:
            self.close()
