"""How all ranks come to save or stop at the same step boundary (pure).

A decision is one 64-bit word in each node's shared page; every rank reads it at every boundary, after it has
published that it stands there. The coordinator proposes a boundary ahead of everyone (tentative), each node checks
that none of its ranks can have gone past it, and only then it is confirmed everywhere; else it is revoked and a
boundary further on is tried. A rank that reaches a tentative boundary waits for the outcome.

Why it is safe. The page is written before the ranks' positions are read, and a rank publishes its position before it
reads the page. So a rank that did not see the proposal is seen to be past it, and one that was not seen to be past it
will see the proposal. A rank that gives up waiting abandons it under the page's lock, so one node has one outcome.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from resilient.errors import LoopMisused

Kind = Literal["save", "stop"]
Answer = Literal["ok", "past", "unready", "busy"]
ANSWERS: tuple[Answer, ...] = ("ok", "past", "unready", "busy")
KINDS: tuple[Kind, ...] = ("save", "stop")
ABANDONED, TENTATIVE, CONFIRMED, REVOKED = 0, 1, 2, 3
"""States. Revoked: by the coordinator, so on every node. Abandoned: by a rank that waited in vain, on its node only."""
MAX_STEP = (1 << 40) - 1
_NUMBERS = 1 << 20  # enough that a number never comes back while its word is in a page
MAX_MARGIN = 1024  # boundaries
RETRY_S, VOTES_WITHIN_S = 0.05, 5.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the word in the page says."""

    kind: Kind
    step: int  # the boundary: completed steps
    number: int  # of the attempt, from 1; tells decisions about one step from each other
    state: int = TENTATIVE

    def __post_init__(self) -> None:
        if not 0 <= self.step <= MAX_STEP:
            raise LoopMisused(f"step {self.step} is outside 0..{MAX_STEP}")

    @property
    def word(self) -> int:
        """As 64 bits: step, number, kind, state."""
        return self.step << 24 | (self.number % _NUMBERS) << 4 | KINDS.index(self.kind) << 2 | self.state


def step_of(word: int) -> int:
    """The boundary in a word."""
    return word >> 24


def state_of(word: int) -> int:
    """The state in a word; ABANDONED for an empty one."""
    return word & 3


def become(word: int, state: int) -> int:
    """The same decision in another state."""
    return word & ~3 | state


def look(word: int, before: int, boundary: int, done: int) -> Literal["pass", "hold", "act"]:
    """What a rank does that comes from boundary `before` (-1 at first) to `boundary` and reads `word`.

    `done` is the last word it acted on. A decision concerns the first boundary at or after its step, and no later
    one: ranks that held at different boundaries would act at different ones.
    """
    if not word or word == done or not before < step_of(word) <= boundary:
        return "pass"
    state = state_of(word)
    return "hold" if state == TENTATIVE else "act" if state == CONFIRMED else "pass"


@dataclass(frozen=True, kw_only=True)
class Position:
    """One living rank, as its node's keeper reads it."""

    boundary: int | None  # the boundary that it last published; None before the first
    held: int  # the word that it waits for, or 0
    done: int  # the last word that it acted on, or 0


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one node says to a proposal."""

    answer: Answer
    furthest: int = 0  # boundary


def busy(word: int, ranks: Iterable[Position]) -> bool:
    """Whether a confirmed decision is in the page that some rank has still to act on; it must not be overwritten."""
    return state_of(word) == CONFIRMED and any(rank.done != word for rank in ranks)


def judge(word: int, ranks: Iterable[Position]) -> Vote:
    """Whether the tentative `word` can be confirmed as far as these ranks are concerned."""
    step, ranks = step_of(word), tuple(ranks)
    furthest = max((rank.boundary or 0 for rank in ranks), default=0)
    if any(rank.boundary is None for rank in ranks):
        return Vote(answer="unready", furthest=furthest)
    if all((rank.boundary is not None and rank.boundary < step) or rank.held == word for rank in ranks):
        return Vote(answer="ok", furthest=furthest)
    return Vote(answer="past", furthest=furthest)


@dataclass(frozen=True, kw_only=True)
class Tell:
    """What the coordinator wants every node to do with `word`."""

    verb: Literal["propose", "confirm", "revoke"]
    word: int  # always the tentative form
    nodes: tuple[int, ...]


@dataclass
class Proposer:
    """The coordinator's side for one kind of decision. Its methods take what happened, and return what to tell."""

    kind: Kind
    nodes: set[int]
    wanted: bool = False
    word: int = 0  # the proposal that is being voted on, or 0
    last: int = 0  # the newest proposal, whatever became of it
    votes: dict[int, Vote] | None = None
    margin: int = 1  # boundaries ahead of the furthest rank
    furthest: int = 0
    number: int = 0
    due_s: float = 0.0  # the next try, or the end of the vote

    def request(self, now_s: float) -> list[Tell]:
        """Somebody wants it to happen. A wish that is already under way is the same wish."""
        if not self.wanted:
            self.wanted, self.margin, self.due_s = True, 1, now_s
        return self.tick(now_s)

    def tick(self, now_s: float) -> list[Tell]:
        """Begin what is due, give up what takes too long."""
        if now_s < self.due_s:
            return []
        if self.word:
            return self._give_up(now_s)
        if not self.wanted:
            return []
        self.number += 1
        step = min(self.furthest + self.margin, MAX_STEP)
        self.word = Decision(kind=self.kind, step=step, number=self.number).word
        self.last = self.word
        self.votes, self.due_s = {}, now_s + VOTES_WITHIN_S
        return [Tell(verb="propose", word=self.word, nodes=tuple(sorted(self.nodes)))]

    def vote(self, node: int, word: int, vote: Vote, now_s: float) -> list[Tell]:
        """A node's answer to a proposal; answers to older ones are ignored."""
        if word != self.word or self.votes is None or node not in self.nodes:
            return []
        self.votes[node] = vote
        return self._count(now_s)

    def gone(self, node: int, now_s: float) -> list[Tell]:
        """A node is lost: nobody waits for it any more."""
        self.nodes.discard(node)
        return self._count(now_s) if self.word else []

    def broken(self, word: int, now_s: float) -> None:
        """A rank revoked the word before it could be confirmed on its node: try again."""
        if not self.word and word == self.last:
            self.wanted, self.due_s = True, now_s + RETRY_S

    def _count(self, now_s: float) -> list[Tell]:
        votes = self.votes or {}
        if not self.nodes <= votes.keys():
            return []
        answers = {votes[node].answer for node in self.nodes}
        self.furthest = max((votes[node].furthest for node in self.nodes), default=0)
        if answers <= {"ok"}:
            word, self.word, self.wanted = self.word, 0, False
            return [Tell(verb="confirm", word=word, nodes=tuple(sorted(self.nodes)))]
        if "busy" in answers:  # an earlier one lies still ahead of some rank: that one serves
            self.wanted = False
        elif "past" in answers:
            # Steps may be shorter than the vote: look further and further ahead.
            self.margin = min(self.margin * 2, MAX_MARGIN)
            return self._give_up(now_s, again_s=0.0)
        return self._give_up(now_s)

    def _give_up(self, now_s: float, *, again_s: float = RETRY_S) -> list[Tell]:
        word, self.word, self.votes, self.due_s = self.word, 0, None, now_s + again_s
        tells = [Tell(verb="revoke", word=word, nodes=tuple(sorted(self.nodes)))]
        return tells + (self.tick(now_s) if again_s == 0.0 else [])
