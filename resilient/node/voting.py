"""A node's part in decisions: puts proposals into the page, judges its ranks' positions, carries out the outcome."""

from __future__ import annotations

from collections.abc import Callable

from resilient.detect import decide
from resilient.detect.decide import Answer, Kind, Vote
from resilient.detect.progress import KeeperPage
from resilient.errors import TimedOut, WireError
from resilient.node.loop import Loop
from resilient.node.members import Members
from resilient.node.wire import Json

# A store is visible to every other core long before this; see decide.py for why positions are read after the page
# is written. A rank that stands at the boundary gets some looks to say that it has seen the proposal.
_SETTLE_S = 0.002
_LOOKS = 10
_RETRY_S, _RETRIES = 0.02, 500


def kind_of(body: Json) -> Kind:
    """The kind of decision that a message is about. Raises WireError."""
    for kind in decide.KINDS:
        if body.get("kind") == kind:
            return kind
    raise WireError(f"there is no decision {body.get('kind')!r}")


def answer_of(body: Json) -> Answer:
    """What a node votes. Raises WireError."""
    for answer in decide.ANSWERS:
        if body.get("answer") == answer:
            return answer
    raise WireError(f"{str(body.get('answer'))[:40]!r} is no vote")


class Voting:
    """Carries out what the coordinator tells this node about decisions."""

    def __init__(
        self, loop: Loop, page: KeeperPage, members: Members, *, alone: bool, answer: Callable[[Json], None]
    ) -> None:
        """alone: there are no other nodes; answer: sends votes to the coordinator."""
        self._loop, self._page, self._members = loop, page, members
        self._alone, self._answer = alone, answer

    def propose(self, kind: Kind, word: int) -> None:
        """Put a tentative decision into the page, then vote."""
        current = self._page.decision(kind)
        if decide.busy(current, self._positions(kind)):
            self._vote(kind, word, Vote(answer="busy"))
            return
        if current and decide.state_of(current) == decide.ABANDONED and not self._alone:
            return  # this node no longer knows what the others do: its ranks are about to say so
        try:
            placed = self._page.swap(kind, current, word, deadline_s=0.0)
        except TimedOut:
            placed = False
        if not placed or not self._members.complete or not self._members.here:
            self._vote(kind, word, Vote(answer="unready"))
            return
        self._loop.later(_SETTLE_S, lambda: self._judge(kind, word, _LOOKS))

    def conclude(self, kind: Kind, word: int, state: int, retries: int = _RETRIES) -> None:
        """Confirm or revoke a tentative decision; a confirmation that comes too late is reported as broken."""
        try:
            done = self._page.swap(kind, word, decide.become(word, state), deadline_s=0.0)
        except TimedOut:  # a rank was stopped with the page's lock in its hand
            if retries:
                self._loop.later(_RETRY_S, lambda: self.conclude(kind, word, state, retries - 1))
            return
        if not done and state == decide.CONFIRMED:
            self._answer({"t": "broken", "kind": kind, "word": word})

    def _judge(self, kind: Kind, word: int, looks: int) -> None:
        if self._page.decision(kind) != word:
            return  # concluded meanwhile
        vote = decide.judge(word, self._positions(kind))
        if vote.answer == "past" and vote.furthest <= decide.step_of(word) and looks > 1:
            self._loop.later(_SETTLE_S, lambda: self._judge(kind, word, looks - 1))
            return
        self._vote(kind, word, vote)

    def _positions(self, kind: Kind) -> list[decide.Position]:
        return [self._page.position(local, kind) for local in self._members.here]

    def _vote(self, kind: Kind, word: int, vote: Vote) -> None:
        self._answer({"t": "vote", "kind": kind, "word": word, "answer": vote.answer, "furthest": vote.furthest})
