"""What the coordinator knows of saves under way on all nodes, and what it does next (pure).

    sealing     some nodes have sealed                 all have -> Prepare
    preparing   leadership, generation, step checked   prepared -> Begin on every node
    writing     nodes persist and report their index   all have -> Commit
    committing  manifest and commit entry              committed -> Done, else Fail

A save ends by Done or by Fail, once, and the same for all nodes. Once it is being committed only the log says how.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from resilient.errors import RanksDisagree, SaveFailed
from resilient.node.messages import Facts, SaveId
from storage.errors import ResilientError

_REMEMBERED = 256


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a node reports of its part."""

    index: Any  # the index's reference, as the format module knows it
    raw_bytes: int
    stored_bytes: int
    persist_s: float


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Lead the run, open the generation if need be, refuse a step that exists."""

    save: SaveId
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Every node may write."""

    save: SaveId
    generation: int


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Every node has written."""

    save: SaveId
    facts: Facts
    generation: int
    parts: tuple[Written, ...]  # by node
    began_s: float


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The save is over. `nodes` is empty for all of them."""

    save: SaveId
    error: ResilientError
    nodes: tuple[int, ...] = ()


Action = Prepare | Begin | Commit | Fail


@dataclass
class _Save:
    facts: Facts
    began_s: float
    phase: Literal["sealing", "preparing", "writing", "committing"] = "sealing"
    generation: int = -1
    sealed: set[int] = field(default_factory=set)
    written: dict[int, Written] = field(default_factory=dict)


class Coordinator:
    """Follows saves. Its methods take what happened and return what to do."""

    def __init__(self, nodes: int, *, seal_timeout_s: float) -> None:
        self._nodes = frozenset(range(nodes))
        self._timeout_s = seal_timeout_s
        self._saves: dict[SaveId, _Save] = {}
        self._ended: dict[SaveId, ResilientError] = {}
        self._lost: dict[int, ResilientError] = {}

    @property
    def under_way(self) -> tuple[SaveId, ...]:
        """Saves that have begun and not ended."""
        return tuple(self._saves)

    def sealed(self, node: int, save: SaveId, facts: Facts, now_s: float) -> list[Action]:
        """All ranks of a node have sealed."""
        if save in self._ended:
            return [Fail(save=save, error=self._ended[save], nodes=(node,))]
        entry = self._saves.setdefault(save, _Save(facts=facts, began_s=now_s))
        entry.sealed.add(node)
        if facts.shared() != entry.facts.shared() or facts.writers != len(self._nodes):
            what = f"node {node} says other things of step {save.step} than its neighbours: {facts.shared()}"
            return self.fail(save, RanksDisagree(what, next="give the same arguments on every rank"))
        if node == 0:  # metrics are rank 0's, and nodes are numbered by their lowest rank
            entry.facts = facts
        for other, error in self._lost.items():
            if other not in entry.sealed:
                return self.fail(save, _without(save, other, error))
        if entry.sealed < self._nodes:
            return []
        entry.phase = "preparing"
        return [Prepare(save=save, facts=entry.facts)]

    def prepared(self, save: SaveId, generation: int) -> list[Action]:
        """The run is led and the step may be written."""
        entry = self._saves.get(save)
        if entry is None:
            return []
        entry.phase, entry.generation = "writing", generation
        return [Begin(save=save, generation=generation)]

    def written(self, node: int, save: SaveId, part: Written) -> list[Action]:
        """A node's part is durable."""
        entry = self._saves.get(save)
        if entry is None or entry.phase != "writing":
            return []
        entry.written[node] = part
        if entry.written.keys() < self._nodes:
            return []
        entry.phase = "committing"
        return [
            Commit(
                save=save,
                facts=entry.facts,
                generation=entry.generation,
                parts=tuple(entry.written[node] for node in sorted(entry.written)),
                began_s=entry.began_s,
            )
        ]

    def void(self, save: SaveId, error: ResilientError) -> list[Action]:
        """A node cannot do its part; too late once the save is being committed."""
        entry = self._saves.get(save)
        if entry is not None and entry.phase == "committing":
            return []
        return self.fail(save, error)

    def fail(self, save: SaveId, error: ResilientError) -> list[Action]:
        """The save is over on every node, also where it has not begun yet."""
        if save in self._ended:
            return []
        self._saves.pop(save, None)
        self._end(save, error)
        return [Fail(save=save, error=error)]

    def committed(self, save: SaveId) -> None:
        """The commit entry is in the log."""
        if self._saves.pop(save, None) is not None:
            self._end(save, SaveFailed(f"step {save.step} was sealed a second time", where=f"nonce {save.nonce}"))

    def lost(self, node: int, error: ResilientError) -> list[Action]:
        """A node's keeper is gone. What it has written stays good."""
        self._lost[node] = error
        actions: list[Action] = []
        for save, entry in list(self._saves.items()):
            if entry.phase != "committing" and node not in entry.written:
                actions += self.fail(save, _without(save, node, error))
        return actions

    def tick(self, now_s: float) -> list[Action]:
        """Give up saves that some node does not seal in time."""
        actions: list[Action] = []
        for save, entry in list(self._saves.items()):
            if entry.phase == "sealing" and now_s >= entry.began_s + self._timeout_s:
                missing = sorted(self._nodes - entry.sealed)
                what = f"nodes {missing} did not seal step {save.step} within {self._timeout_s:g} s of the first"
                actions += self.fail(save, SaveFailed(what, next="see what the ranks of these nodes do"))
        return actions

    def _end(self, save: SaveId, error: ResilientError) -> None:
        self._ended[save] = error
        while len(self._ended) > _REMEMBERED:
            del self._ended[next(iter(self._ended))]


def _without(save: SaveId, node: int, error: ResilientError) -> SaveFailed:
    return SaveFailed(
        f"node {node} is gone ({error.what}) and its part of step {save.step} with it",
        next="the step before is still there; start the run again",
    )
