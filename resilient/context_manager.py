"""The public face: wrap an existing training loop, and it is restored, saved and stopped as one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import TracebackType

from resilient.cadence import Every, parse
from resilient.checkpoint.retention import Keep
from resilient.checkpoint.state import flatten
from resilient.checkpointer import Checkpointer
from resilient.errors import LoopMisused
from resilient.run import Run, RunSettings

STORE_VARIABLE = "RESILIENT_STORE"
_log = logging.getLogger("resilient")

Cadence = Every | str | Mapping[str, Every | str]


@dataclass(frozen=True)
class From:
    """Where a new run starts: another run's checkpoint. Used only while the run itself has no commit yet.

    url   the other run; only   which entries of `state` ("model", or patterns); step   which, None for the newest.
    The loop still begins at step 0, with this process's own random numbers.
    """

    url: str
    _: KW_ONLY
    only: str | Sequence[str] | None = None
    step: int | None = None
    strict: bool = True
    storage_options: Mapping[str, object] | None = None


class context:  # noqa: N801  (the contract's name: it reads as `with resilient.context(...)`)
    """Keeps a training loop restorable: use it as a context manager, or call `.open()` where a framework owns the loop.

    url              path or fsspec URL of the run; default: the RESILIENT_STORE of the environment
    state            what training changes: modules, optimizers, schedulers, samplers, tensors, nested plain values
    every            Every(steps=...), Every(minutes=...), "auto", or per tier {"memory": ..., "storage": ...}
    keep             retention of committed steps
    codec            "auto", "raw" or "fast"
    init             From(...): where a run without commits starts
    storage_options  fsspec's; environment and profiles work without
    on_preempt       "raise": `steps` raises Preempted (exit code 75) after a stop; "flag": it sets `run.stopping`
    commit_timeout_s how long leaving waits for the last commit; after an exception it is exception_timeout_s

    Everything is collective: all ranks of torch.distributed enter it together; with no process group, one process.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        state: Mapping[str, object],
        every: Cadence = "auto",
        keep: Keep | None = None,
        codec: str = "auto",
        init: From | None = None,
        storage_options: Mapping[str, object] | None = None,
        on_preempt: str = "raise",
        commit_timeout_s: float = 3600.0,
        exception_timeout_s: float = 30.0,
        **checkpointer_options: object,
    ) -> None:
        where = os.fspath(url) if url is not None else os.environ.get(STORE_VARIABLE)
        if not where:
            raise LoopMisused("no place to save to", next=f"pass a path or URL, or set {STORE_VARIABLE}")
        if on_preempt not in ("raise", "flag"):
            raise LoopMisused(f"on_preempt={on_preempt!r}", next='use "raise" or "flag"')
        self._url, self._state, self._init = where, state, init
        self._keep, self._codec, self._storage_options = keep, codec, storage_options
        self._checkpointer_options = checkpointer_options
        self._settings = RunSettings(
            cadence=parse(every),
            on_preempt=on_preempt,
            commit_timeout_s=commit_timeout_s,
            exception_timeout_s=exception_timeout_s,
        )
        self._run: Run | None = None

    def open(self) -> Run:
        """Restore the newest committed step into `state` (or start as `init` says) and return the run. Collective."""
        flatten(self._state)  # what cannot be saved is told now, not after hours of training
        checkpointer = Checkpointer(
            self._url,
            keep=self._keep,
            codec=self._codec,
            storage_options=self._storage_options,
            **self._checkpointer_options,  # type: ignore[arg-type]
        )
        try:
            step = checkpointer.restore(self._state)
            if step is None and self._init is not None:
                self._start_from(self._init)
            checkpointer.connect()
        except BaseException:
            checkpointer.close()
            raise
        return Run(
            checkpointer,
            self._state,
            step=step,
            settings=self._settings,
        )

    def __enter__(self) -> Run:
        if self._run is not None:
            raise LoopMisused("this context was entered before", next="make a new resilient.context(...)")
        self._run = self.open()
        return self._run

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._run is not None:
            self._run.leave(error)

    def _start_from(self, init: From) -> None:
        with Checkpointer(init.url, storage_options=init.storage_options) as other:
            step = other.restore(self._state, step=init.step, only=init.only, strict=init.strict, randomness=False)
        if step is None:
            raise LoopMisused(
                "init= names a run without any commit", where=init.url, next="check the URL with `resilient ls`"
            )
