"""One run of a training loop: its steps, saves, stops and the order in which they may happen."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from resilient.cadence import Cost, Plan, assumed_mtbf
from resilient.checkpointer import Checkpointer
from resilient.errors import Fenced, LoopMisused, Preempted
from resilient.node.client import Pending
from resilient.sampler import Sampler
from resilient.signals import StopSignals
from storage.errors import ResilientError

_log = logging.getLogger("resilient")

HEALTH_EVERY_STEPS = 64
"""How often, in steps, ranks make sure that every keeper lives; a save makes sure as well."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run behaves at its boundaries."""

    cadence: Plan
    on_preempt: str = "raise"
    commit_timeout_s: float = 3600.0
    exception_timeout_s: float = 30.0


class Run:
    """What `resilient.context` gives: the loop's steps and what may be asked of them.

    step      the next step to run, which is the number of completed ones
    restored  whether a committed step was restored (then `step` is that step)
    stopping  true once a stop was agreed on and its step saved (on_preempt="flag")
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: Mapping[str, object],
        *,
        step: int | None,
        settings: RunSettings,
    ) -> None:
        self.step, self.restored, self.stopping = step or 0, step is not None, False
        self._checkpointer, self._state, self._settings = checkpointer, state, settings
        self._saved_step = step
        self._saved_at_s = time.monotonic()
        self._metrics: dict[str, object] = {}
        self._pending: list[Pending] = []
        self._last: Pending | None = None
        self._finished = False  # `steps` came to its end
        self._inside = False  # between begin_step and end_step, where the state is torn
        self._broken_off = False  # by `break`, in the middle of a step
        self._save_asked = False  # by the loop's body, for the end of this step
        self._cost: Cost | None = None  # of the last save that was committed
        self._closed = False
        self._samplers = [value for value in state.values() if isinstance(value, Sampler)]
        self._stop = StopSignals()
        checkpointer.page.begin(self.step)
        if settings.cadence.memory is not None and checkpointer.ranks.rank == 0:
            _log.warning("every= names a memory tier, which needs a launcher that keeps it: only storage is saved to")
        self.hooks_s = 0.0  # time spent in our own code at step boundaries, saves not counted

    # ---- the loop
    def steps(self, total: int) -> Iterator[int]:
        """Steps `run.step` .. `total - 1`; after the last one the state is saved, and leaving waits for its commit.

        A step is complete when the loop asks for the next one. `break` leaves the current step incomplete.
        Raises Preempted (SystemExit with code 75) after a stop, unless on_preempt="flag": then it just ends.
        """
        if self._broken_off:  # the loop was left by `break`: its step is run again
            self._broken_off = self._inside = False
        while self.step < total and not self.stopping:
            self.begin_step()
            try:
                yield self.step
            except GeneratorExit:
                self._broken_off = True
                raise
            self.end_step()
        self._finished = True
        if not self.stopping and self._saved_step != self.step:
            self._save_now()

    def begin_step(self) -> None:
        """The state begins to change. Raises LoopMisused when the last step was not ended."""
        self._check_open()
        if self._inside:
            raise LoopMisused(f"step {self.step} was begun twice", next="call end_step() first")
        self._inside = True
        self._metrics.clear()  # they belong to the step that reported them, not to those after it

    def end_step(self) -> None:
        """The step is complete on this rank: saves and stops that are due happen here.

        Raises Preempted, Fenced (another writer took over this run), LoopMisused.
        """
        begun_s = time.perf_counter()
        if not self._inside:
            raise LoopMisused("end_step() without begin_step()", next="call begin_step() first, or use run.steps(n)")
        self._inside = self._broken_off = False
        self.step += 1
        for sampler in self._samplers:
            sampler.end_step()
        kind = self._boundary()
        self.hooks_s += time.perf_counter() - begun_s
        if kind is not None:
            self._act(kind)

    def report(self, **values: object) -> None:
        """Remember numbers of this step on this rank (loss=..., tokens=...). Tensors are read only when a save is.

        A save at this step's end keeps rank 0's numbers, for `resilient ls` and Keep(best=..., by=...). What was not
        reported in that very step is not known of it.
        """
        self._metrics.update(values)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Mark a stretch of the loop that takes its own time (an evaluation), so that it has its own limit."""
        page = self._checkpointer.page
        page.enter(name)
        try:
            yield
        finally:
            page.leave()

    def save(self) -> Pending | None:
        """Save at the next boundary: now if between steps (its Pending), else at this step's end (None). Collective."""
        self._check_open()
        if self._broken_off:
            raise LoopMisused(
                f"step {self.step} was broken off, so the state may be torn",
                next="call end_step() first if the step was complete, or go on with run.steps(...)",
            )
        if self._inside:
            self._save_asked = True
            return None
        if self._saved_step == self.step:
            return self._last or Pending.settled(self.step)
        return self._save_now()

    def stop(self) -> None:
        """Ask for a stop, as SIGTERM does: after a step that all ranks agree on, saved. Any rank may ask."""
        self._stop.ask()

    # ---- leaving
    def close(self) -> None:
        """Wait for the last commit and let go of everything. Collective. Raises what the last save failed with."""
        self.leave(None)

    def leave(self, error: BaseException | None) -> None:
        """As close(); with an error (which goes on) pending saves get a bounded wait, and their failures a warning."""
        if self._closed:
            return
        self._closed = True
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._stop.restore)
                # After a failure peers may be gone for good: what can be waited for is waited for below.
                stack.callback(self._checkpointer.close, 60.0 if self._orderly(error) else 2.0)
                if error is None and not self._finished:
                    self._stop_late()
                self._wait_for_commits(
                    self._settings.commit_timeout_s if self._orderly(error) else self._settings.exception_timeout_s
                )
        except ResilientError as failure:
            if error is None or isinstance(error, Preempted):
                raise
            _log.warning("while leaving after %s: %s", type(error).__name__, failure)

    def _stop_late(self) -> None:
        """A stop that was asked for too late to be decided on: save what is complete and not yet saved."""
        wanted = int(self._stop.wanted and not self._inside and not self.stopping)
        low, high = self._checkpointer.ranks.agree([wanted, self.step, int(self._inside)])
        if high[0] and low[1] == high[1] and not high[2]:
            self.stopping = True
            if self._saved_step != self.step:
                self._save_now()

    # ---- at a boundary
    def _boundary(self) -> str | None:
        """What to do at this boundary, the same on every rank: "stop", "save" or nothing."""
        checkpointer, cadence = self._checkpointer, self._settings.cadence
        checkpointer.page.publish(self.step)
        if self._stop.wanted:
            checkpointer.ask("stop")
        elif cadence.by_time and checkpointer.ranks.rank == 0 and self._time_due():
            checkpointer.ask("save")
        self._reap()
        decision = checkpointer.page.decision_at(self.step)
        if decision == "stop":
            return "stop"
        if decision == "save" or self._save_asked or cadence.step_due(self.step):
            return "save"
        if self.step % HEALTH_EVERY_STEPS == 0:
            checkpointer.connect()
        return None

    def _time_due(self) -> bool:
        # Only rank 0's clock decides; the others hear of it through the keepers, at a boundary that all can reach.
        since_s = time.monotonic() - self._saved_at_s
        mtbf = assumed_mtbf(self._checkpointer.ranks.size)
        return self._settings.cadence.time_due(since_s, cost=self._cost, mtbf=mtbf)

    def _act(self, kind: str) -> None:
        if self._saved_step != self.step:
            self._save_now()
        if kind == "stop":
            self._wait_for_commits(self._settings.commit_timeout_s)
            self.stopping = True
            if self._settings.on_preempt == "raise":
                raise Preempted(self.step)

    def _save_now(self) -> Pending:
        self._save_asked = False
        pending = self._checkpointer.save(self.step, self._state, metrics=_numbers(self._metrics))
        self._saved_step, self._saved_at_s = self.step, time.monotonic()
        self._pending.append(pending)
        self._last = pending
        return pending

    def _reap(self) -> None:
        """Take note of saves that ended. A failed one is a warning, another follows; a fenced run must end."""
        while self._pending and self._pending[0].done():
            pending = self._pending.pop(0)
            try:
                pending.result(0)
                durable_s = pending.commit.total_s if pending.commit else 0.0
                self._cost = Cost(loop_s=self._checkpointer.stalled_s, durable_s=durable_s)
            except Fenced:
                raise
            except ResilientError as failure:
                if self._checkpointer.ranks.rank == 0:
                    _log.warning("save failed, training goes on: %s", failure)

    def _wait_for_commits(self, timeout_s: float) -> None:
        """Wait for every pending save. Raises what the last one failed with; earlier failures are warnings."""
        self._checkpointer.hurry()
        deadline_s = time.monotonic() + timeout_s
        while self._pending:
            pending = self._pending.pop(0)
            try:
                pending.result(max(0.0, deadline_s - time.monotonic()))
            except ResilientError as failure:
                if not self._pending or isinstance(failure, Fenced):
                    raise
                _log.warning("save failed, a later one follows: %s", failure)

    @staticmethod
    def _orderly(error: BaseException | None) -> bool:
        return error is None or isinstance(error, Preempted)

    def _check_open(self) -> None:
        if self._closed:
            raise LoopMisused("the run is closed", next="make a new resilient.context(...)")


def _numbers(metrics: Mapping[str, object]) -> dict[str, float]:
    """What can be a number, as one; here, at a save, tensors are read."""
    numbers = {}
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            plain = value.detach() if hasattr(value, "detach") else value
            numbers[name] = float(plain)  # type: ignore[arg-type]
    return numbers
