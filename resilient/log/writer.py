"""What a leader may append, as steps without a store (see protocol)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from resilient.errors import EntryInvalid, EpochUncertain, Fenced, OffLine, Overtaken
from resilient.log.entries import MAX_ENTRY_BYTES, Base, Commit, Drop, Entry, Epoch, Generation, Ref, State
from resilient.log.envelope import digest
from resilient.log.protocol import HINT_KEY, Position, Put, PutIfAbsent, Steps, catch_up, hint_bytes
from resilient.log.summary import encode_summary
from resilient.log.validity import Objection, judge
from resilient.log.view import LogView

BASE_EVERY = 256  # entries
_DROP_BYTES = MAX_ENTRY_BYTES - 512  # for references; the rest of the entry needs less than 512


def refusal(objection: Objection) -> Fenced | OffLine | EntryInvalid:
    """The typed error for an objection to an entry of ours."""
    if objection.rule == "epoch":
        return Fenced(objection.what, next="stop writing; another process leads this run now")
    if objection.rule == "line":
        return OffLine(objection.what, next="restore again: the run goes on elsewhere")
    return EntryInvalid(objection.what, next="read the log again")


def base_key(upto: int, nonce: str) -> str:
    """Key of the summary of the slots before `upto`."""
    return f"log/base-{upto:020d}-{nonce}"


class Writer(Position):
    """One leadership: the prefix read so far and the epoch under which this writer may append."""

    def __init__(self, view: LogView, *, nonce: Callable[[], str], clock_ns: Callable[[], int]) -> None:
        super().__init__(view)
        self.epoch = -1  # none claimed yet
        self._nonce, self._clock_ns = nonce, clock_ns

    def claim(self, address: str, restored_at: int | None = None) -> Steps[int]:
        """Append an epoch; from here on every older one is fenced. Returns its number.

        `restored_at` is the next_slot of the view that this process restored from. Raises Overtaken, and writes
        nothing, if a commit stands behind it: going on from before it would take it off the line.
        """
        entry = Epoch(nonce=self._nonce(), address=address, wall_ns=self._clock_ns())

        def make(view: LogView) -> Entry:
            behind = [known.step for known in view.live if restored_at is not None and known.slot >= restored_at]
            if behind:
                raise Overtaken(
                    f"step {max(behind)} was committed by others since this process restored (log slot {restored_at})",
                    next="if they are gone, start again: it restores what they saved",
                )
            return entry

        self.epoch = yield from self.append(make)
        return self.epoch

    def check(self, view: LogView) -> None:
        """Raises Fenced if the epoch in `view` is not ours, EpochUncertain if a damaged entry may hide a newer one."""
        if view.epoch != self.epoch:
            raise refusal(Objection(rule="epoch", what=f"epoch {view.epoch} leads, not epoch {self.epoch} any more"))
        hidden = [slot for slot in view.damaged if slot > self.epoch]
        if hidden:
            raise EpochUncertain(
                f"slot {hidden[-1]} is damaged and may have held an epoch newer than {self.epoch}",
                next="claim a new epoch and open a new generation",
            )

    def refresh(self) -> Steps[LogView]:
        """Read on without writing. Raises Fenced as soon as another leads."""
        self.view = yield from catch_up(self.view)
        self.check(self.view)
        return self.view

    def checked(self, make: Callable[[LogView], Entry]) -> Callable[[LogView], Entry]:
        """`make`, raising what forbids its entry at the end of the prefix."""

        def checked_make(view: LogView) -> Entry:
            self.check(view)
            entry = make(view)
            objection = judge(view, view.next_slot, entry)
            if objection is not None:
                raise refusal(objection)
            return entry

        return checked_make

    def open_generation(
        self, *, members: int, layout: Mapping[str, int], restored: State | None, source: str
    ) -> Steps[int]:
        """Append a generation that goes on from `restored`; from the newest commit where that is None.

        Returns its number. Raises Fenced; OffLine when the run no longer descends from `restored`, or when that is a
        snapshot and a damaged entry may hide that it does not.
        """
        nonce = self._nonce()

        def make(view: LogView) -> Entry:
            chosen = restored
            if chosen is None and view.newest is not None:
                chosen = view.newest.state
            if chosen is not None and not _restorable(view, chosen):
                raise OffLine(
                    f"step {chosen.step} of generation {chosen.generation} is not on the run's line any more",
                    next="restore again, all ranks",
                )
            return Generation(
                epoch=self.epoch, nonce=nonce, members=members, layout=dict(layout), restored=chosen, source=source
            )

        return (yield from self.append(self.checked(make)))

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
    ) -> Steps[int]:
        """Append a commit, or find the one that an earlier call with the same nonce and manifest appended.

        Returns its slot. Raises Fenced, OffLine, EntryInvalid (also for `uses` that view.usable denies);
        OutcomeUnknown when it may or may not be there.
        """
        nonce = nonce or self._nonce()
        wall_ns = self._clock_ns()
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        state = State(generation=generation, step=step)

        def make(view: LogView) -> Entry:
            opened = view.opened(generation)
            if opened is None:
                raise EntryInvalid(f"generation {generation} has not been opened", next="open it first")
            if view.on_line(state) and not view.snapshot_counts(state):
                raise OffLine(
                    f"a damaged entry may hide that step {step} of generation {generation} was left behind",
                    next="open a new generation",
                )
            lost = [used.key for used in uses if not view.usable(used)]
            if lost:
                raise EntryInvalid(f"it uses {lost[0]}, which is or may be dropped", next="write those data again")
            return Commit(
                epoch=self.epoch, nonce=nonce, generation=generation, step=step, restore_step=opened.restore_step,
                tier=tier, manifest=manifest, uses=tuple(uses), metrics=numbers, wall_ns=wall_ns,
            )  # fmt: skip

        def find_or_make(view: LogView) -> Entry | int:
            for known in view.live:
                if known.entry.nonce == nonce and known.manifest == manifest:
                    return known.slot  # written by a call whose outcome was unknown
            for known in view.off_line:
                if known.manifest == manifest:  # written so too, and left behind since
                    raise OffLine(f"step {step} was committed in slot {known.slot}, and left behind since")
            return self.checked(make)(view)

        return (yield from self.append(find_or_make))

    def drop(self, manifests: Sequence[Ref]) -> Steps[int]:
        """Condemn these manifests, in as many entries as they need. Returns the last one's slot.

        What view.may_delete says may be deleted afterwards, by anyone, at any time. Raises Fenced, EntryInvalid.
        """
        slot = self.view.next_slot - 1
        left = [ref for ref in manifests if ref.key not in self.view.dropped]
        while left:
            now: list[Ref] = []
            room = _DROP_BYTES
            for ref in left:
                room -= len(ref.key) + len(ref.hash) + 32
                if room < 0:
                    break
                now.append(ref)
            entry = Drop(epoch=self.epoch, nonce=self._nonce(), manifests=tuple(now))
            slot = yield from self.append(self.checked(_always(entry)))
            left = left[len(now) :]
        return slot

    def sum_up(self, every: int = BASE_EVERY) -> Steps[bool]:
        """Write the hint, and before it a base if `every` entries have come since the last; whether it wrote a base."""
        view = self.view
        if view.next_slot - (view.last_base or 0) < every:
            yield Put(key=HINT_KEY, data=hint_bytes(view.last_base, view.next_slot))
            return False
        summary, nonce = encode_summary(view), self._nonce()
        ref = Ref(key=base_key(view.next_slot, nonce), hash=digest(summary), size=len(summary))
        yield PutIfAbsent(key=ref.key, data=summary)

        def make(now: LogView) -> Entry:
            return Base(epoch=self.epoch, nonce=nonce, summary=ref, upto=view.next_slot, previous=now.last_base)

        slot = yield from self.append(self.checked(make))
        yield Put(key=HINT_KEY, data=hint_bytes(slot, slot + 1))
        return True


def _restorable(view: LogView, state: State) -> bool:
    committed = any(known.state == state for known in view.live)
    return view.on_line(state) and (committed or view.snapshot_counts(state))


def _always(entry: Entry) -> Callable[[LogView], Entry]:
    return lambda _: entry
