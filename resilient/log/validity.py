"""What a log says: validity as a function of the prefix, so that all readers agree (pure)."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from resilient.log.entries import Base, Commit, Drop, Entry, Epoch, Generation, State
from resilient.log.view import Committed, LogView, Opened, is_known, line_bound


@dataclass(frozen=True, kw_only=True)
class Objection:
    """Why an entry is not valid at the end of a prefix."""

    rule: str  # "epoch", "line", "drop" or "order"
    what: str


class _Draft:
    """A view in the making: the same fields, changed in place while entries are applied."""

    def __init__(self, view: LogView) -> None:
        self.next_slot, self.epoch, self.leader = view.next_slot, view.epoch, view.leader
        self.generations, self.live, self.off_line = list(view.generations), list(view.live), list(view.off_line)
        self.dropped: dict[str, int] | Mapping[str, int] = view.dropped
        self.damaged, self.invalid, self.last_base = list(view.damaged), view.invalid, view.last_base
        self._owns_dropped = False

    def view(self) -> LogView:
        return LogView(
            next_slot=self.next_slot,
            epoch=self.epoch,
            leader=self.leader,
            generations=tuple(self.generations),
            live=tuple(self.live),
            off_line=tuple(self.off_line),
            dropped=MappingProxyType(dict(self.dropped)) if self._owns_dropped else self.dropped,
            damaged=tuple(self.damaged),
            invalid=self.invalid,
            last_base=self.last_base,
        )

    def drop(self, key: str, slot: int) -> None:
        if not self._owns_dropped:
            self.dropped, self._owns_dropped = dict(self.dropped), True
        self.dropped[key] = slot  # type: ignore[index]  # owned: a dict


_Facts = LogView | _Draft


def _older_epoch(facts: _Facts, epoch: int) -> Objection | None:
    """The entry's leader has been replaced (or never led)."""
    if epoch == facts.epoch:
        return None
    if epoch in facts.damaged and (facts.epoch is None or epoch > facts.epoch):
        return None  # the damaged entry was this epoch's: who wrote under it had seen it whole
    newest = "no epoch" if facts.epoch is None else f"epoch {facts.epoch}"
    return Objection(rule="epoch", what=f"written in epoch {epoch}, {newest} leads")


def _off_line(facts: _Facts, state: State) -> Objection | None:
    """A later generation went on from an earlier step."""
    bound = line_bound(facts.generations, state.generation)
    if bound is None or state.step <= bound:
        return None
    what = f"step {state.step} of generation {state.generation}: a later generation went on from step {bound}"
    return Objection(rule="line", what=what)


def _unknown(facts: _Facts, generation: int) -> Objection | None:
    if is_known(facts.generations, facts.damaged, generation):
        return None
    return Objection(rule="order", what=f"generation {generation} has not been opened")


def _refers_to_dropped(facts: _Facts, commit: Commit) -> Objection | None:
    """The data may be gone already."""
    for ref in (commit.manifest, *commit.uses):
        # That it was committed at all is the writer's to know: here its entry may be damaged, which must not undo ours.
        if ref.key in facts.dropped:
            return Objection(rule="drop", what=f"{ref.key} was dropped in slot {facts.dropped[ref.key]}")
    return None


def _drops_another(facts: _Facts, drop: Drop) -> Objection | None:
    """Key and hash must both be those of the commit that is meant."""
    named = {ref.key: ref.hash for ref in drop.manifests}
    for known in (*facts.live, *facts.off_line):
        if named.get(known.manifest.key, known.manifest.hash) != known.manifest.hash:
            return Objection(rule="drop", what=f"it names {known.manifest.key} with another hash")
    return None


def judge(facts: _Facts, slot: int, entry: Entry) -> Objection | None:
    """Why `entry` is not valid in `slot`, the one after the prefix that `facts` sums up; None if it is."""
    if isinstance(entry, Epoch):
        return None
    objection = _older_epoch(facts, entry.epoch)
    if objection is not None:
        return objection
    if isinstance(entry, Generation):
        if entry.restored is None:
            return None
        return _unknown(facts, entry.restored.generation) or _off_line(facts, entry.restored)
    if isinstance(entry, Commit):
        return _unknown(facts, entry.generation) or _off_line(facts, entry.state) or _refers_to_dropped(facts, entry)
    if isinstance(entry, Drop):
        return _drops_another(facts, entry)
    return None if entry.upto <= slot else Objection(rule="order", what=f"a base up to {entry.upto} in slot {slot}")


def _leave_the_line(draft: _Draft) -> None:
    """Move the commits that a new generation left behind."""
    left = [commit for commit in draft.live if _off_line(draft, commit.state) is not None]
    if left:
        slots = {commit.slot for commit in left}
        draft.live = [commit for commit in draft.live if commit.slot not in slots]
        draft.off_line += left


def _open(draft: _Draft, slot: int, entry: Generation) -> None:
    # None is the beginning, even if commits are seen: what a damaged entry hides may differ between readers, and the
    # writer, who had to go on from the newest, had read this very prefix.
    step = 0 if entry.restored is None else entry.restored.step
    draft.generations.append(Opened(slot=slot, restore_step=step, restored=entry.restored, entry=entry))
    _leave_the_line(draft)


def _commit(draft: _Draft, slot: int, entry: Commit) -> None:
    if entry.generation in draft.damaged and all(opened.slot != entry.generation for opened in draft.generations):
        opened = Opened(slot=entry.generation, restore_step=entry.restore_step, restored=None)
        insort(draft.generations, opened, key=lambda known: known.slot)
        _leave_the_line(draft)
    insort(draft.live, Committed(slot=slot, entry=entry), key=lambda known: (known.step, known.slot))


def _drop(draft: _Draft, slot: int, entry: Drop) -> None:
    condemned = {ref.key for ref in entry.manifests}
    draft.live = [commit for commit in draft.live if commit.manifest.key not in condemned]
    draft.off_line = [commit for commit in draft.off_line if commit.manifest.key not in condemned]
    for key in condemned:
        draft.drop(key, slot)


def _apply(draft: _Draft, slot: int, entry: Entry | None) -> None:
    if slot != draft.next_slot:
        raise ValueError(f"slot {slot} after a prefix of {draft.next_slot}")
    draft.next_slot = slot + 1
    if entry is None:
        draft.damaged.append(slot)
    elif isinstance(entry, Epoch):
        draft.epoch, draft.leader = slot, entry.address
    elif judge(draft, slot, entry) is not None:
        draft.invalid += 1
    else:
        if entry.epoch != draft.epoch:
            draft.epoch, draft.leader = entry.epoch, ""  # its own entry is damaged
        if isinstance(entry, Generation):
            _open(draft, slot, entry)
        elif isinstance(entry, Commit):
            _commit(draft, slot, entry)
        elif isinstance(entry, Drop):
            _drop(draft, slot, entry)
        elif isinstance(entry, Base):
            draft.last_base = slot


def fold_all(view: LogView, entries: Iterable[Entry | None]) -> LogView:
    """The view after the slots that follow `view.next_slot`; None stands for a damaged entry."""
    draft = _Draft(view)
    for entry in entries:
        _apply(draft, draft.next_slot, entry)
    return draft.view()


def fold(view: LogView, slot: int, entry: Entry | None) -> LogView:
    """The view after one more slot, which must be `view.next_slot`; None stands for a damaged entry."""
    draft = _Draft(view)
    _apply(draft, slot, entry)
    return draft.view()
