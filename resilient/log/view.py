"""What a prefix of the log says, as a value (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from resilient.log.entries import Commit, Generation, Ref, State


@dataclass(frozen=True, kw_only=True)
class Committed:
    """A commit and the slot that holds it."""

    slot: int
    entry: Commit

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.entry.step

    @property
    def generation(self) -> int:
        """The generation whose state it is."""
        return self.entry.generation

    @property
    def state(self) -> State:
        """What it is a checkpoint of."""
        return self.entry.state

    @property
    def manifest(self) -> Ref:
        """The object that names all others."""
        return self.entry.manifest

    @property
    def metrics(self) -> Mapping[str, float]:
        """As handed over at the save."""
        return self.entry.metrics


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A generation; `entry` is None when its own entry is damaged and a commit of it told what is known."""

    slot: int
    restore_step: int
    restored: State | None  # resolved: None only where there was nothing to go on from
    entry: Generation | None = None


def line_bound(generations: Iterable[Opened], generation: int) -> int | None:
    """The lowest restore step of the generations later than this one; None if there is none."""
    return min((opened.restore_step for opened in generations if opened.slot > generation), default=None)


def is_known(generations: Iterable[Opened], damaged: Sequence[int], generation: int) -> bool:
    """Whether this generation has been opened."""
    # A damaged slot that others name as a generation must have been one: nobody names what he has not read.
    return generation in damaged or any(opened.slot == generation for opened in generations)


@dataclass(frozen=True, kw_only=True)
class LogView:
    """Everything that the slots 0 .. next_slot-1 say."""

    next_slot: int = 0
    epoch: int | None = None  # the newest, a slot; None: nobody has led yet
    leader: str = ""  # its address
    generations: tuple[Opened, ...] = ()  # ascending
    live: tuple[Committed, ...] = ()  # valid, on the line, not dropped; ascending by step, then slot
    off_line: tuple[Committed, ...] = ()  # once valid, left behind by a later generation, not dropped yet
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # manifest key -> slot of the drop
    damaged: tuple[int, ...] = ()  # slots, ascending
    invalid: int = 0  # entries that were skipped because a rule objects to them
    last_base: int | None = None  # slot

    @cached_property
    def commits(self) -> tuple[Committed, ...]:
        """The committed steps, ascending; where a step was committed twice, the newer one."""
        return tuple({commit.step: commit for commit in self.live}.values())

    @property
    def newest(self) -> Committed | None:
        """The commit that a restore without a wish takes."""
        return self.live[-1] if self.live else None

    @cached_property
    def replaced(self) -> tuple[Committed, ...]:
        """Live commits hidden by a newer one of the same step: to be dropped."""
        shown = {commit.slot for commit in self.commits}
        return tuple(commit for commit in self.live if commit.slot not in shown)

    def find(self, step: int) -> Committed | None:
        """The commit of this step."""
        return next((commit for commit in self.commits if commit.step == step), None)

    def opened(self, generation: int) -> Opened | None:
        """The generation of this number."""
        return next((opened for opened in self.generations if opened.slot == generation), None)

    def on_line(self, state: State) -> bool:
        """Whether the run still descends from `state`, committed or in memory."""
        bound = line_bound(self.generations, state.generation)
        return is_known(self.generations, self.damaged, state.generation) and (bound is None or state.step <= bound)

    def snapshot_counts(self, state: State) -> bool:
        """Whether a snapshot in memory may be restored: on the line, and no damaged entry can hide that it is not."""
        return self.on_line(state) and all(slot < state.generation for slot in self.damaged)

    def in_use(self, manifest: Ref) -> bool:
        """Whether a commit that is not dropped refers to this manifest's data."""
        return any(
            manifest.key == commit.manifest.key or any(manifest.key == used.key for used in commit.entry.uses)
            for commit in (*self.live, *self.off_line)
        )

    def usable(self, manifest: Ref) -> bool:
        """Whether a new commit may refer to this manifest's data: committed, and no damaged entry can be its drop."""
        return any(
            commit.manifest == manifest and all(slot < commit.slot for slot in self.damaged)
            for commit in (*self.live, *self.off_line)
        )

    def may_delete(self, manifest: Ref) -> bool:
        """Whether the data under this manifest are condemned and used by nothing else."""
        return manifest.key in self.dropped and not self.in_use(manifest)

    def is_orphan(self, prefix: str, epoch: int) -> bool:
        """Whether the data of one attempt, `data/<generation>/<step>/<nonce>`, can never become a commit's.

        To be asked by the leader of `epoch` with all entries up to its own read: attempts under a generation opened
        before that epoch and not committed by then are lost. Never so while a damaged entry may be their commit.
        """
        generation = prefix.split("/")[1]
        inside = prefix.rstrip("/") + "/"
        named = (ref for commit in (*self.live, *self.off_line) for ref in (commit.manifest, *commit.entry.uses))
        old = generation.isdigit() and int(generation) < epoch <= self.next_slot - 1
        return old and not self.damaged and not any(ref.key.startswith(inside) for ref in named)


EMPTY = LogView()
