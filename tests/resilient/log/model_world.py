"""The world of the model check: a store that delays, repeats and loses puts, and the truth about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from dataclasses import replace as changed
from random import Random
from typing import Any

from resilient.errors import LogDamaged, TimedOut
from resilient.log.entries import Commit, Epoch, Generation, State
from resilient.log.protocol import HINT_KEY, Get, Put, PutIfAbsent, Wait, slot_key
from resilient.log.summary import decode_summary, encode_summary
from resilient.log.validity import fold
from resilient.log.view import EMPTY, LogView
from storage.errors import KeyExists, OutcomeUnknown, StoreUnavailable
from tests.resilient.log.model_words import Ack, Choice, Delete, Faults, List, Violation, parts_of, understood


@dataclass
class World:
    """Objects, messages under way, memory of the nodes, and what must hold."""

    rng: Random
    faults: Faults
    without: frozenset[str] = frozenset()  # rules that actors leave out
    now: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)
    late: list[PutIfAbsent | Put] = field(default_factory=list)
    original: list[bytes] = field(default_factory=list)  # the slots as they were written
    views: list[LogView] = field(default_factory=lambda: [EMPTY])  # by prefix, of the slots as they are
    shadow: LogView = EMPTY  # of the slots as they were written
    parents: dict[int, State | None] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    memory: list[State] = field(default_factory=list)
    away: list[State] = field(default_factory=list)  # snapshots of nodes that may return
    acks: list[Ack] = field(default_factory=list)
    writers: dict[int, int] = field(default_factory=dict)  # slot -> who was told that it is his
    damaged: set[int] = field(default_factory=set)
    damaged_at: int = -1
    counts: Counter[str] = field(default_factory=Counter)
    nonces: int = 0

    @property
    def truth(self) -> LogView:
        """What a reader of everything must see now."""
        return self.views[-1]

    def nonce(self) -> str:
        """16 hex digits, never the same twice (unless that rule is left out)."""
        self.nonces += 1
        return "0" * 16 if "entries carry a nonce" in self.without else f"{self.nonces:016x}"

    def clock_ns(self) -> int:
        """A clock that stands: nothing may depend on it."""
        return 1

    # ---- operations
    def perform(self, op: Any) -> Any:
        """Answer of `op`; raises what the store would."""
        if isinstance(op, Get):
            return self._get(op)
        if isinstance(op, (PutIfAbsent, Put)):
            return self._put(op)
        if isinstance(op, Delete):
            if self._chance(self.faults.refused):
                raise StoreUnavailable("model")
            self.delete(op.key)
        elif isinstance(op, List):
            return sorted(key for key in self.objects if key.startswith(op.prefix))
        elif isinstance(op, Wait) and self._chance(self.faults.give_up):
            raise TimedOut("model")
        return None

    def _chance(self, p: float) -> bool:
        return p > 0 and self.rng.random() < p

    def _get(self, op: Get) -> tuple[bytes | None, ...]:
        if self._chance(self.faults.refused):
            if "an error is not absence" in self.without:
                return (None,) * len(op.keys)
            raise StoreUnavailable("model")
        found = (self.objects.get(key) for key in op.keys)
        return tuple(b"" if data is not None and len(data) > op.max_bytes else data for data in found)

    def _put(self, op: PutIfAbsent | Put) -> None:
        faults, rng = self.faults, self.rng
        if self._chance(faults.refused):
            raise StoreUnavailable("model")
        if self._chance(faults.delayed):
            self.counts["delayed puts"] += 1
            self.late += [op] * rng.randint(0, 2)  # none: lost
            raise OutcomeUnknown("model")
        if self._chance(faults.repeated):
            self.late.append(op)
        done = self.carry_out(op)
        if self._chance(faults.reply_lost):
            raise OutcomeUnknown("model")
        if not done:
            raise KeyExists("model")

    def carry_out(self, op: PutIfAbsent | Put) -> bool:
        """The put reaches the store; False if it changed nothing because the key holds other bytes."""
        present = self.objects.get(op.key)
        overwrite = "put if absent" in self.without and op.key.startswith("log/0")
        if isinstance(op, PutIfAbsent) and present is not None and not overwrite:
            return present == op.data
        self.objects[op.key] = op.data
        if op.key.startswith("log/0"):
            if present is not None and present != op.data:
                self.original[int(op.key[4:])] = op.data
                self.rebuild()
            self._extend()
        return True

    def delete(self, key: str) -> None:
        """Remove an object."""
        self.objects.pop(key, None)
        if key.startswith("data/"):
            self.check_data()

    # ---- the truth
    def _extend(self) -> None:
        while (data := self.objects.get(slot_key(len(self.original)))) is not None:
            slot = len(self.original)
            self.original.append(data)
            self._note(slot, data)
            self.shadow = fold(self.shadow, slot, understood(data))
            self.views.append(fold(self.truth, slot, understood(data)))
            self.check()

    def _note(self, slot: int, data: bytes) -> None:
        entry = understood(data)
        if isinstance(entry, Generation):
            choice = self.choices[int(entry.source)]
            self.parents[slot] = entry.restored
            # A commit left behind by an entry that is damaged now may come back, and then the shadow does not know
            # the generations that go on from it. Snapshots never come back.
            state = choice.state if choice.from_memory else None
            if state and self.shadow.opened(state.generation) and not self.shadow.on_line(state):
                raise Violation(f"SNAPSHOT generation {slot} goes on from {state}, which was left behind")

    def rebuild(self) -> None:
        """All views anew, after bytes of a slot have changed."""
        self.views, self.shadow = [EMPTY], EMPTY
        for slot, data in enumerate(self.original):
            self.shadow = fold(self.shadow, slot, understood(data))
            self.views.append(fold(self.truth, slot, understood(self.objects.get(slot_key(slot), data))))
        self.check()

    def damage_slot(self, slot: int) -> None:
        """Change a bit of a slot."""
        data = bytearray(self.objects[slot_key(slot)])
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        self.objects[slot_key(slot)] = bytes(data)
        self.damaged.add(slot)
        self.damaged_at = self.now
        self.counts["damaged entries"] += 1
        self.rebuild()

    def damage_hint(self) -> None:
        """Make the hint or a summary missing, stale, damaged or another's."""
        bases = [key for key in self.objects if key.startswith("log/base-")]
        key = self.rng.choice([*bases, HINT_KEY])
        if key not in self.objects:
            return
        self.counts["damaged hints"] += 1
        kind = self.rng.randrange(4)
        data = self.objects[key]
        if kind == 0:
            del self.objects[key]
        elif kind == 1:
            at = self.rng.randrange(len(data))
            self.objects[key] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        elif key == HINT_KEY:  # an old one, or one of another run
            self.objects[key] = self.rng.choice([data, data.replace(b'"base":', b'"base":1')])
        else:  # well formed, and not what the base entry names
            try:
                self.objects[key] = encode_summary(changed(decode_summary(data), live=(), off_line=()))
            except LogDamaged:
                return

    # ---- invariants
    def check(self) -> None:
        """What must hold whenever a slot is filled or changed."""
        live = {commit.slot for commit in self.truth.live}
        for ack in list(self.acks):
            if ack.slot not in live:
                self._excuse(ack)
        self.check_data()
        if not self.damaged:
            self._check_line()

    def _excuse(self, ack: Ack) -> None:
        """A commit may go because its entry is damaged, or because it was dropped."""
        commit = understood(self.original[ack.slot]) if ack.slot < len(self.original) else None
        if not isinstance(commit, Commit):
            raise Violation(f"LOST step {ack.step}: slot {ack.slot} does not hold the acknowledged commit")
        if ack.slot not in self.damaged:
            self._justify(ack, commit)
        self.acks.remove(ack)

    def _justify(self, ack: Ack, commit: Commit) -> None:
        drop = self.shadow.dropped.get(commit.manifest.key, self.truth.dropped.get(commit.manifest.key))
        if drop is not None and (self.damaged or ack.slot in {known.slot for known in self.views[drop].live}):
            newest = self.views[drop + 1].newest
            if not self.damaged and (newest is None or newest.step < ack.step):
                raise Violation(f"LOST step {ack.step} (slot {ack.slot}) was dropped with nothing as new left")
            return
        for opened in (*self.shadow.generations, *self.truth.generations):
            entry = understood(self.original[opened.slot])
            if isinstance(entry, Generation) and opened.restore_step < ack.step:
                choice = self.choices[int(entry.source)]
                if choice.goes_back and choice.at is not None and ack.slot < choice.at:
                    return  # it was seen, and left behind on purpose
        raise Violation(f"LOST step {ack.step} of generation {commit.generation}, acknowledged in slot {ack.slot}")

    def check_data(self) -> None:
        """Every live commit finds what it refers to."""
        for commit in self.truth.live:
            if commit.manifest.key in self.shadow.dropped:
                continue  # the entry of its drop is damaged: data missing, a typed error, the fallback
            for ref in (commit.manifest, *commit.entry.uses):
                for key in parts_of(ref):
                    if key not in self.objects:
                        raise Violation(f"DATA {key} of the live commit in slot {commit.slot} was deleted")

    def _check_line(self) -> None:
        """All live commits lie in one history."""
        newest = self.truth.newest
        if newest is None:
            return
        reached: dict[int, int] = {}
        state: State | None = newest.state
        while state is not None and state.generation not in reached:
            reached[state.generation] = state.step
            state = self.parents.get(state.generation)
        for commit in self.truth.live:
            if commit.step > reached.get(commit.generation, -1):
                raise Violation(f"LINE {commit.state} is live beside {newest.state}, which does not descend from it")

    def check_read(self, view: LogView, began: int, at_least: int) -> None:
        """A reading that began at `began`, when the log had `at_least` slots."""
        self.counts["readings"] += 1
        if self.damaged_at >= began:
            return
        if view.next_slot < at_least:
            raise Violation(f"STALE a reader saw {view.next_slot} of {at_least} slots")
        if self.acks and not view.live and any(ack.slot < view.next_slot for ack in self.acks):
            raise Violation(f"EMPTY a reader saw no commit in {view.next_slot} slots, {len(self.acks)} are there")
        # A base may sum up what has been damaged since: such a reader knows more than one that starts at 0.
        expected = self.views[view.next_slot]
        if view.damaged == expected.damaged and view != expected:
            raise Violation(f"DISAGREE readers of {view.next_slot} slots see different things")

    def check_append(self, slot: int, epoch: int, who: int) -> None:
        """A writer was told that the slot is his."""
        if self.writers.setdefault(slot, who) != who:
            raise Violation(f"TWO writers were told that slot {slot} is theirs")
        for other in range(epoch + 1, min(slot, len(self.original))):
            if isinstance(understood(self.original[other]), Epoch):
                raise Violation(f"FENCE epoch {epoch} was told that slot {slot} is its own, epoch {other} is newer")
