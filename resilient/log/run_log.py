"""The log of a run in a store: reading it, leading it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from resilient.errors import Fenced, SaveUnknown, TimedOut
from resilient.log.entries import Ref, State
from resilient.log.protocol import Answer, Get, Op, Put, PutIfAbsent, Steps, catch_up, read_all
from resilient.log.view import LogView
from resilient.log.writer import BASE_EVERY, Writer
from storage.errors import KeyMissing, OutcomeUnknown, ResilientError, StoreError, StoreUnsupported, TooLarge
from storage.failpoint import failpoint
from storage.store import Store

T = TypeVar("T")
_PARALLEL_GETS = 16
_FEW_GETS = 4  # up to here a thread costs more than it saves
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0

_logger = logging.getLogger("resilient.log")


class SingleWriterWarning(UserWarning):
    """The store cannot keep two writers apart; the message says what that means."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Clock, randomness and patience of a log, passed in."""

    patience_s: float = 60.0  # how long a put is repeated until its slot is seen filled
    clock_ns: Callable[[], int] = time.time_ns  # only written down, never compared
    now_s: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    nonce: Callable[[], str] = field(default=lambda: secrets.token_hex(8))


def _fetch(store: Store, key: str, max_bytes: int) -> bytes | None:
    try:
        return store.get(key, max_bytes=max_bytes)
    except KeyMissing:
        return None
    except TooLarge:
        return b""  # no entry, hint or summary is empty: it counts as damaged


class _Driver:
    """Carries out steps on a store."""

    def __init__(self, store: Store, around: Surroundings, patience_s: float) -> None:
        self._store, self._around = store, around
        self._give_up_s = around.now_s() + patience_s

    def drive(self, steps: Steps[T]) -> T:
        """Run to the end. Raises what the steps raise."""
        with ExitStack() as stack:
            pool: ThreadPoolExecutor | None = None
            try:
                op = next(steps)
                while True:
                    try:
                        if isinstance(op, Get) and len(op.keys) > _FEW_GETS and pool is None:
                            pool = stack.enter_context(ThreadPoolExecutor(_PARALLEL_GETS, "log-read"))
                        answer = self._act(op, pool)
                    except ResilientError as error:
                        op = steps.throw(error)
                    else:
                        op = steps.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    def _act(self, op: Op, pool: ThreadPoolExecutor | None) -> Answer:
        if isinstance(op, Get):
            if pool is None or len(op.keys) <= _FEW_GETS:
                return tuple(_fetch(self._store, key, op.max_bytes) for key in op.keys)
            return tuple(pool.map(lambda key: _fetch(self._store, key, op.max_bytes), op.keys))
        if isinstance(op, PutIfAbsent):
            self._store.put_if_absent(op.key, op.data)
        elif isinstance(op, Put):
            self._store.put(op.key, op.data)
        else:
            wait_s = min(_FIRST_WAIT_S * 2.0 ** min(op.attempt, 10), _LONGEST_WAIT_S)
            if self._around.now_s() + wait_s > self._give_up_s:
                raise TimedOut(f"no answer from the store after {op.attempt + 1} tries", where=self._store.url)
            self._around.sleep(wait_s)
        return None


class RunLog:
    """A run's log. Reading never writes; `lead` is how one becomes its writer."""

    def __init__(
        self,
        store: Store,
        *,
        single_writer: bool = False,
        base_every: int = BASE_EVERY,
        around: Surroundings | None = None,
        report: Callable[[str], None] = _logger.warning,
    ) -> None:
        """`single_writer`: accept a store without put-if-absent, the caller vouching that nobody else writes.

        `base_every`: entries between two bases; `report` is told of damage and of housekeeping that failed.
        """
        self.store = store
        self._single_writer, self._base_every = single_writer, base_every
        self._around, self._report = around or Surroundings(), report
        self._reported: set[int] = set()

    def read(self, view: LogView | None = None) -> LogView:
        """All that the log says now; with `view`, only what came after it is fetched.

        Sees every entry that was acknowledged before the call. Raises StoreError; LogDamaged when a slot in the
        middle is gone; FormatUnsupported when a newer version writes this log. Damaged entries are skipped,
        reported, and listed in `damaged`.
        """
        result = self._drive(read_all() if view is None else catch_up(view))
        self._tell_damage(result)
        return result

    def lead(self, address: str, *, restored_at: int | None = None) -> Leader:
        """Claim a new epoch, which fences every other writer.

        `restored_at`: next_slot of the view that this process restored from, if it has. Raises Overtaken, fencing
        nobody, when others have committed since: a job that wakes up late must not undo what its successor did.
        Raises StoreUnsupported for a store that cannot keep writers apart (see `single_writer`); StoreUnavailable.
        Whether it is time to lead is the caller's to know: nothing here waits for the present leader to be gone.
        """
        self._check_store()
        view = self.read()
        writer = Writer(view, nonce=self._around.nonce, clock_ns=self._around.clock_ns)
        failpoint("log.before_epoch")
        self._drive(writer.claim(address, restored_at))
        return Leader(self, writer)

    def _check_store(self) -> None:
        if self.store.conditional:
            return
        if not self._single_writer:
            raise StoreUnsupported(
                "the store has no atomic put-if-absent, so two writers could both believe to lead this run",
                where=self.store.url,
                next="use a store that has it, or pass single_writer=True if never more than one process writes",
            )
        warnings.warn(
            f"{self.store.url} has no atomic put-if-absent. With one writer this is fine. What is weaker: a former "
            "writer that wakes up is not fenced, and can replace entries that the new one wrote, commits included; so "
            "start a writer only when the one before is surely gone.",
            SingleWriterWarning,
            stacklevel=3,
        )

    def _drive(self, steps: Steps[T], patience_s: float | None = None) -> T:
        patience_s = self._around.patience_s if patience_s is None else patience_s
        return _Driver(self.store, self._around, patience_s).drive(steps)

    def _tell_damage(self, view: LogView) -> None:
        for slot in view.damaged:
            if slot not in self._reported:
                self._reported.add(slot)
                self._report(f"log entry {slot} of {self.store.url} is damaged and was skipped")


class Leader:
    """One leadership. Methods may be called from several threads; each raises Fenced once another leads.

    EpochUncertain (a Fenced) means that a damaged entry may hide another leader: `RunLog.lead` again, and open a new
    generation. OutcomeUnknown or SaveUnknown: the entry may be there or still arrive; call again with the same
    arguments, and until that has succeeded delete nothing that the entry refers to.
    """

    def __init__(self, log: RunLog, writer: Writer) -> None:
        self._log, self._writer = log, writer
        self._lock = threading.Lock()

    @property
    def epoch(self) -> int:
        """The number of this leadership."""
        return self._writer.epoch

    @property
    def view(self) -> LogView:
        """The prefix read so far."""
        return self._writer.view

    def refresh(self) -> LogView:
        """Read on, without writing. Raises Fenced."""
        return self._run(self._writer.refresh())

    def open_generation(
        self, *, members: int, layout: Mapping[str, int], restored: State | None = None, source: str = ""
    ) -> int:
        """Open a generation that goes on from `restored`, the newest commit if None. Returns its number.

        Raises Fenced; OffLine when the run does not descend from `restored` any more; OutcomeUnknown.
        """
        steps = self._writer.open_generation(members=members, layout=layout, restored=restored, source=source)
        return self._run(steps, housekeeping=True)

    def commit(
        self,
        *,
        generation: int,
        step: int,
        tier: str,
        manifest: Ref,
        uses: Sequence[Ref] = (),
        metrics: Mapping[str, float] | None = None,
        nonce: str | None = None,
    ) -> int:
        """Commit a checkpoint whose objects are all durable; when this returns, the step exists. Returns the slot.

        `uses`: manifests of other commits whose data this one refers to. `nonce` (16 hex digits, one per save): pass
        it to be able to call again after SaveUnknown. Whether the step exists already is the caller's to ask
        (`view.find`).

        Raises Fenced (other than EpochUncertain), EntryInvalid, EntryTooLarge, StoreUnavailable: not committed, and
        never will be by this call, so its data may be deleted. OffLine: not committed, or left behind since; the data
        may be deleted after a drop that names the manifest. SaveUnknown, and EpochUncertain after it: delete nothing.
        """
        steps = self._writer.commit(
            generation=generation, step=step, tier=tier, manifest=manifest, uses=uses, metrics=metrics, nonce=nonce
        )
        failpoint("commit.before_entry")
        try:
            slot = self._run(steps, housekeeping=True)
        except OutcomeUnknown as error:
            raise SaveUnknown(f"step {step}: {error.what}", where=error.where, next=error.next) from error
        failpoint("commit.after_entry")
        return slot

    def drop(self, manifests: Sequence[Ref]) -> int:
        """Condemn these manifests. Afterwards what `view.may_delete` says may be deleted. Returns the last slot.

        Raises Fenced, EntryInvalid; OutcomeUnknown: delete nothing yet.
        """
        return self._run(self._writer.drop(manifests), housekeeping=True)

    def _run(self, steps: Steps[T], *, housekeeping: bool = False) -> T:
        with self._lock:
            try:
                result = self._log._drive(steps)  # noqa: SLF001  (the two are one)
            finally:
                self._log._tell_damage(self._writer.view)  # noqa: SLF001
            if housekeeping:
                self._sum_up()
            return result

    def _sum_up(self) -> None:
        try:
            self._log._drive(self._writer.sum_up(self._log._base_every), patience_s=0)  # noqa: SLF001
        except Fenced:
            return  # the base is the new leader's to write; the next call of this one will say so
        except StoreError as error:
            # Only makes reading faster; what was asked for is done. The next entry tries again.
            self._log._report(f"no base written: {error}")  # noqa: SLF001
