"""The page that ranks publish their progress in, shared with their keeper: who stands where, and what is decided.

One memfd per node, 64-bit words in the machine's own order. Words are written by single aligned stores. A rank has
two records and writes them in turn, each with a check word over the others: a reader takes the newer one that is
whole, whatever the processor reorders, and also when the rank was killed or stopped in the middle of a write.

    words 0..7      magic, layout version, slots, keeper's beat (mono ns), decision "save", decision "stop"
    from word 64    one slot of 96 words per local rank:
      0..6, 8..14   two records: count, generation, step, phase, mono ns, hook ns, check
      16..19        boundary + 1, held word, done "save", done "stop"           (single words)
      24..87        names of phases, 16 of 32 bytes
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from resilient.detect import decide
from resilient.errors import KeeperLost, LoopMisused, TimedOut, WireError

MAGIC, LAYOUT = 0x7265_7369_6C69_656E, 1
_BEAT, _DECISION = 3, 4  # one decision word per kind
_FIRST_SLOT, _SLOT_WORDS = 64, 96
_RECORD_WORDS, _RECORDS = 7, (0, 8)
_BOUNDARY, _HELD, _DONE, _NAMES = 16, 17, 18, 24
MAX_PHASES, NAME_BYTES = 16, 32
_MASK = (1 << 64) - 1
_TRIES = 100
PHASES = ("start", "step")  # numbers 0 and 1 on every rank


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One rank's last published record."""

    generation: int
    step: int  # completed steps
    phase: str
    mono_ns: int  # CLOCK_MONOTONIC of the node
    hook_ns: int  # time spent in our own code at boundaries since the start, saves not counted


def page_bytes(slots: int) -> int:
    """Size of a page for this many ranks."""
    return (_FIRST_SLOT + slots * _SLOT_WORDS) * 8


def _check(count: int, generation: int, step: int, phase: int, mono_ns: int, hook_ns: int) -> int:
    mixed = count * 0x9E3779B97F4A7C15 ^ generation * 0xC2B2AE3D27D4EB4F ^ step * 0x165667B19E3779F9
    return (mixed ^ phase * 0xD6E8FEB86659FD93 ^ mono_ns * 0xFF51AFD7ED558CCD ^ hook_ns * 0xA0761D6478BD642F) & _MASK


class Page:
    """The mapped page: what every reader of it can do."""

    def __init__(self, fd: int) -> None:
        """Take over `fd`. Raises WireError if it is not a page."""
        self.fd = fd
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise WireError(f"the progress page cannot be mapped: {error}") from error
        self._words = memoryview(self._map).cast("Q")
        self.slots = (len(self._words) - _FIRST_SLOT) // _SLOT_WORDS
        if self._words[0] != MAGIC or self._words[1] != LAYOUT or self._words[2] != self.slots:
            self.close()
            raise WireError("the descriptor is not a progress page of this version")

    def progress(self, slot: int) -> Progress | None:
        """The last record of a rank; None before its first. Raises TimedOut if it cannot be read (a broken page)."""
        at, records = self._at(slot), []
        for _ in range(_TRIES):
            records = [self._words[at + r : at + r + _RECORD_WORDS].tolist() for r in _RECORDS]
            whole = [fields for *fields, check in records if fields[0] and _check(*fields) == check]
            if whole:
                _, generation, step, phase, mono_ns, hook_ns = max(whole)
                name = self._name(at, phase)
                return Progress(generation=generation, step=step, phase=name, mono_ns=mono_ns, hook_ns=hook_ns)
            if not any(fields[0] for fields in records):
                return None
        # The rank may be writing its very first record.
        if any(fields[0] > 1 for fields in records):
            raise TimedOut(f"slot {slot} of the progress page cannot be read: {records}")
        return None

    def position(self, slot: int, kind: decide.Kind) -> decide.Position:
        """Where a rank stands, as decisions of this kind are judged by."""
        at = self._at(slot)
        boundary = self._words[at + _BOUNDARY]
        return decide.Position(
            boundary=boundary - 1 if boundary else None,
            held=self._words[at + _HELD],
            done=self._words[at + _DONE + decide.KINDS.index(kind)],
        )

    def decision(self, kind: str) -> int:
        """The decision word of this kind."""
        return self._words[_DECISION + decide.KINDS.index(kind)]

    def beat_ns(self) -> int:
        """When the keeper last showed that it lives (mono ns)."""
        return self._words[_BEAT]

    def swap(self, kind: str, expected: int, word: int, *, deadline_s: float = 1.0) -> bool:
        """Replace a decision word if it is still `expected`, atomically between processes; whether it was.

        Raises TimedOut when another process keeps the page's lock (it was stopped there).
        """
        until = time.monotonic() + deadline_s
        while True:
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 8)
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise TimedOut(f"the progress page stayed locked for {deadline_s:g} s") from error
            time.sleep(0.0005)
        try:
            at = _DECISION + decide.KINDS.index(kind)
            if self._words[at] != expected:
                return False
            self._words[at] = word
            return True
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN, 8)

    def close(self) -> None:
        """Unmap, and close the descriptor."""
        self._words.release()
        self._map.close()
        os.close(self.fd)

    def _at(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise LoopMisused(f"the page has no slot {slot}, only {self.slots}")
        return _FIRST_SLOT + slot * _SLOT_WORDS

    def _name(self, at: int, phase: int) -> str:
        if phase < len(PHASES):
            return PHASES[phase]
        start = (at + _NAMES) * 8 + phase % MAX_PHASES * NAME_BYTES
        return bytes(self._map[start : start + NAME_BYTES]).rstrip(b"\0").decode(errors="replace")


class KeeperPage(Page):
    """The keeper's side: it makes the page."""

    def __init__(self, slots: int) -> None:
        fd = os.memfd_create("resilient-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, page_bytes(slots))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        with mmap.mmap(fd, page_bytes(slots)) as fresh, memoryview(fresh).cast("Q") as words:
            words[0], words[1], words[2] = MAGIC, LAYOUT, slots
        super().__init__(fd)

    def beat(self) -> None:
        """Show that the keeper lives."""
        self._words[_BEAT] = time.monotonic_ns()


class ProgressPage(Page):
    """A rank's side: it writes its own slot and reads decisions."""

    def __init__(
        self,
        fd: int,
        slot: int,
        *,
        generation: int = 0,
        alone: bool = True,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        """alone: there is one node, so its page holds the whole truth; alive: whether the keeper is."""
        super().__init__(fd)
        self.generation, self.alive, self._alone = generation, alive, alone
        self._base = self._at(slot)
        self._count = 0
        self._step = 0
        self._before = -1  # the boundary before this one
        self._phase = 0
        self._stack: list[int] = []
        self._names = list(PHASES)
        self._seen = [0] * len(decide.KINDS)  # words that ask nothing more of this rank
        self.hook_ns = 0
        self.hold_within_s = 15.0  # longer than the coordinator lets a vote last

    def publish(self, step: int, phase: str | None = None) -> None:
        """This rank has completed `step` steps and is now in `phase` ("step" unless told)."""
        self._step = step
        self._phase = 1 if phase is None else self._number(phase)
        self._write()

    def enter(self, phase: str) -> None:
        """A phase of its own begins. Raises LoopMisused for more than 16 different names."""
        self._stack.append(self._phase)
        self._phase = self._number(phase)
        self._write()

    def leave(self) -> None:
        """The phase that was entered last is over."""
        self._phase = self._stack.pop() if self._stack else 1
        self._write()

    def begin(self, step: int) -> None:
        """This rank stands at boundary `step` before its first step: decisions concern later boundaries only.

        Without it a decision about an early step would concern each rank's first boundary, wherever that is.
        """
        self._before = step
        self.publish(step, "start")
        self._words[self._base + _BOUNDARY] = step + 1

    def decision_at(self, step: int) -> decide.Kind | None:
        """What all ranks do at this boundary: "stop", "save" or None. "stop" means: save, then stop.

        Costs under a microsecond when nothing is pending. Waits (bounded) while a proposal for this very boundary
        is being voted on. Raises KeeperLost where other nodes may have decided otherwise than this one can know.
        """
        words = self._words
        words[self._base + _BOUNDARY] = step + 1  # before the decisions are read: see decide.py
        save, stop = words[_DECISION], words[_DECISION + 1]
        before, self._before = self._before, step
        if save == self._seen[0] and stop == self._seen[1]:
            return None
        acts = [kind for kind in decide.KINDS if self._settle(kind, before, step)]
        return "stop" if "stop" in acts else "save" if acts else None

    def _settle(self, kind: decide.Kind, before: int, step: int) -> bool:
        index = decide.KINDS.index(kind)
        word = self._words[_DECISION + index]
        verdict = decide.look(word, before, step, self._seen[index])
        if verdict == "hold":
            word = self._hold(kind, word)
            verdict = decide.look(word, before, step, self._seen[index])
        if verdict == "act":
            self._words[self._base + _DONE + index] = word
        elif decide.state_of(word) == decide.ABANDONED and word and word != self._seen[index] and not self._alone:
            raise KeeperLost(
                f"the keeper went away while {kind!r} after step {decide.step_of(word)} was being decided",
                next="start the run again: the other nodes may have decided without this one",
            )
        if verdict == "act" or decide.state_of(word) in (decide.REVOKED, decide.ABANDONED):
            self._seen[index] = word
        return verdict == "act"

    def _hold(self, kind: decide.Kind, word: int) -> int:
        """Wait for the outcome of a tentative word; abandon it when nobody will tell. Returns what the page says."""
        self._words[self._base + _HELD] = word
        until = time.monotonic() + self.hold_within_s
        at = _DECISION + decide.KINDS.index(kind)
        pause_s = 0.0001
        while self._words[at] == word:
            if time.monotonic() > until or not self.alive():
                self.swap(kind, word, decide.become(word, decide.ABANDONED))
                break
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.005)
        return self._words[at]

    def _number(self, phase: str) -> int:
        try:
            return self._names.index(phase)
        except ValueError:
            pass
        number, name = len(self._names), phase.encode()[:NAME_BYTES]
        if number >= MAX_PHASES:
            raise LoopMisused(f"{phase!r} would be phase {number + 1}, a run has at most {MAX_PHASES}")
        start = (self._base + _NAMES) * 8 + number * NAME_BYTES
        self._map[start : start + NAME_BYTES] = name.ljust(NAME_BYTES, b"\0")
        self._names.append(phase)
        return number

    def _write(self) -> None:
        self._count = count = self._count + 1
        words, at = self._words, self._base + _RECORDS[count % 2]
        now_ns = time.monotonic_ns()
        words[at] = count
        words[at + 1] = self.generation
        words[at + 2] = self._step
        words[at + 3] = self._phase
        words[at + 4] = now_ns
        words[at + 5] = self.hook_ns
        words[at + 6] = _check(count, self.generation, self._step, self._phase, now_ns, self.hook_ns)
