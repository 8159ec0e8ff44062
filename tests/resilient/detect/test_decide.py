"""Decisions: whatever the timing, all ranks act at the same boundary, and nobody waits for ever."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.detect import decide
from resilient.detect.decide import CONFIRMED, REVOKED, Position, Proposer, Vote

LAST_STEP = 60


@dataclass
class Rank:
    """One rank's loop, cut into its single reads and writes of the page."""

    boundary: int | None = None
    before: int = -1
    held: int = 0
    done: int = 0
    at: int = 0  # the boundary it is about to publish
    doing: str = "step"
    acted: list[int] = field(default_factory=list)
    alive: bool = True

    @property
    def finished(self) -> bool:
        return not self.alive or self.at > LAST_STEP


@dataclass
class World:
    """Nodes with one page word each, messages between them and the coordinator, and a scheduler without mercy."""

    chance: random.Random
    nodes: int
    ranks_per_node: int
    now_s: float = 0.0
    look_first: bool = False  # a mutant: judge before the page is written

    def __post_init__(self) -> None:
        self.pages = [0] * self.nodes
        self.ranks = [[Rank() for _ in range(self.ranks_per_node)] for _ in range(self.nodes)]
        self.proposer = Proposer(kind="save", nodes=set(range(self.nodes)))
        self.to_node: list[deque[decide.Tell]] = [deque() for _ in range(self.nodes)]
        self.to_lead: deque[tuple[int, int, Vote]] = deque()
        self.judging: list[int] = [0] * self.nodes
        self.looks = [0] * self.nodes
        self.confirmed: list[int] = []
        self.keeper_dead = False

    def spread(self, tells: list[decide.Tell]) -> None:
        for tell in tells:
            if tell.verb == "confirm":
                self.confirmed.append(tell.word)
            for node in tell.nodes:
                self.to_node[node].append(tell)

    def positions(self, node: int) -> list[Position]:
        return [Position(boundary=r.boundary, held=r.held, done=r.done) for r in self.ranks[node] if r.alive]

    def node_moves(self, node: int) -> None:
        if self.keeper_dead:
            return
        if self.to_node[node]:
            tell = self.to_node[node].popleft()
            page = self.pages[node]
            if tell.verb == "propose":
                if decide.busy(page, self.positions(node)):
                    self.to_lead.append((node, tell.word, Vote(answer="busy")))
                else:
                    if self.look_first:
                        self.to_lead.append((node, tell.word, decide.judge(tell.word, self.positions(node))))
                    else:
                        self.pages[node] = tell.word
                    self.judging[node], self.looks[node] = tell.word, 3
            elif page == tell.word:
                self.pages[node] = decide.become(page, CONFIRMED if tell.verb == "confirm" else REVOKED)
        elif self.judging[node] and self.look_first:
            self.pages[node], self.judging[node] = self.judging[node], 0
        elif self.judging[node]:
            word = self.judging[node]
            if self.pages[node] != word:
                self.judging[node] = 0
                return
            vote = decide.judge(word, self.positions(node))
            self.looks[node] -= 1
            if vote.answer == "past" and self.looks[node] > 0:
                return
            self.judging[node] = 0
            self.to_lead.append((node, word, vote))

    def lead_moves(self) -> None:
        if self.keeper_dead:
            return
        if self.to_lead:
            node, word, vote = self.to_lead.popleft()
            self.spread(self.proposer.vote(node, word, vote, self.now_s))
        else:
            self.now_s += 0.02
            self.spread(self.proposer.tick(self.now_s))

    def rank_moves(self, node: int, rank: Rank) -> None:
        """One read or write of the page at a time, as the scheduler likes."""
        if rank.doing == "step":
            rank.boundary, rank.doing = rank.at, "read"
            return
        word = self.pages[node]
        verdict = decide.look(word, rank.before, rank.at, rank.done)
        if verdict == "hold" and not self.keeper_dead:
            rank.held = word
            return
        if verdict == "hold":  # under the page's lock, so that it is one move
            self.pages[node] = decide.become(word, decide.ABANDONED)
        if verdict == "act":
            rank.done = word
            rank.acted.append(rank.at)
        rank.before, rank.at, rank.doing = rank.at, rank.at + 1, "step"

    def movers(self) -> list[tuple[int, Rank | None]]:
        movers: list[tuple[int, Rank | None]] = [(-1, None)]
        movers += [(node, None) for node in range(self.nodes)]
        movers += [(node, rank) for node in range(self.nodes) for rank in self.ranks[node] if not rank.finished]
        return movers

    def run(self, *, moves: int, requests: set[int], deaths: dict[int, tuple[int, int]], keeper_dies: int = -1) -> None:
        # Some are quick and some are slow, and that changes: a single speed hides most races.
        weights: dict[tuple[int, int], float] = {}
        for move in range(moves):
            if move in requests:
                self.spread(self.proposer.request(self.now_s))
            if move == keeper_dies:
                self.keeper_dead = True
            if move in deaths:
                node, index = deaths[move]
                self.ranks[node % self.nodes][index % self.ranks_per_node].alive = False
            if move % 40 == 0:
                weights.clear()
            movers = self.movers()
            keys = [(node, id(rank)) for node, rank in movers]
            chosen = self.chance.choices(
                movers, [weights.setdefault(key, 10 ** self.chance.uniform(-2, 0)) for key in keys]
            )[0]
            node, rank = chosen
            if rank is not None:
                self.rank_moves(node, rank)
            elif node < 0:
                self.lead_moves()
            else:
                self.node_moves(node)

    def settle(self) -> None:
        """Everybody gets to move in turn: no rank may be left waiting."""
        for _ in range(4000):
            for node, rank in self.movers():
                if rank is not None:
                    self.rank_moves(node, rank)
                elif node < 0:
                    self.lead_moves()
                else:
                    self.node_moves(node)
            if all(rank.finished for ranks in self.ranks for rank in ranks):
                return
        raise AssertionError("a rank waits for ever")

    def check(self) -> None:
        ranks = [rank for ranks in self.ranks for rank in ranks]
        survivors = [rank.acted for rank in ranks if rank.alive]
        assert all(acted == survivors[0] for acted in survivors), survivors
        for rank in ranks:  # the dead did nothing that the living did not
            if not rank.alive and survivors:
                assert rank.acted == survivors[0][: len(rank.acted)], (rank.acted, survivors[0])


def play(seed: int, *, look_first: bool = False) -> World:
    chance = random.Random(seed)
    world = World(chance=chance, nodes=chance.randint(1, 3), ranks_per_node=chance.randint(1, 3), look_first=look_first)
    moves = chance.randint(50, 700)
    requests = {chance.randrange(moves) for _ in range(chance.randint(1, 4))}
    deaths = {}
    if chance.random() < 0.4:
        deaths = {chance.randrange(moves): (chance.randrange(3), chance.randrange(3))}
    # With one node its page is the whole truth; with several, ranks that cannot know the outcome raise KeeperLost.
    keeper_dies = chance.randrange(moves) if world.nodes == 1 and chance.random() < 0.3 else -1
    world.run(moves=moves, requests=requests, deaths=deaths, keeper_dies=keeper_dies)
    world.settle()
    return world


def torn(seed: int, *, look_first: bool = False) -> bool:
    try:
        play(seed, look_first=look_first).check()
    except AssertionError:
        return True
    return False


@settings(max_examples=120, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_all_ranks_act_at_the_same_boundary_and_nobody_waits_for_ever(seed: int) -> None:
    play(seed).check()


def test_a_request_in_good_time_is_acted_on() -> None:
    acted = 0
    for seed in range(40):
        chance = random.Random(seed)
        world = World(chance=chance, nodes=2, ranks_per_node=2)
        world.run(moves=600, requests={5}, deaths={})
        world.settle()
        world.check()
        acted += bool(world.ranks[0][0].acted)
    assert acted >= 35


def test_the_check_catches_a_keeper_that_looks_before_it_writes() -> None:
    assert any(torn(seed, look_first=True) for seed in range(500))


def test_a_rank_that_came_past_the_step_neither_holds_nor_acts() -> None:
    word = decide.Decision(kind="stop", step=10, number=1).word
    assert decide.look(word, 9, 10, 0) == "hold"
    assert decide.look(word, 9, 12, 0) == "hold"  # a loop whose boundaries are four steps apart
    assert decide.look(word, 10, 11, 0) == "pass"
    assert decide.look(decide.become(word, CONFIRMED), 10, 11, 0) == "pass"


def test_words_keep_step_number_and_kind_apart() -> None:
    words = {
        decide.Decision(kind=kind, step=step, number=number).word
        for kind in decide.KINDS
        for step in (0, 1, decide.MAX_STEP)
        for number in (1, 2)
    }
    assert len(words) == 12
    assert all(word < 1 << 64 for word in words)


def test_a_confirmed_decision_is_not_overwritten_before_all_have_acted() -> None:
    word = decide.become(decide.Decision(kind="save", step=5, number=1).word, CONFIRMED)
    ahead, acted = Position(boundary=4, held=0, done=0), Position(boundary=5, held=0, done=word)
    assert decide.busy(word, [ahead, acted])
    assert not decide.busy(word, [acted])


def test_a_node_that_is_lost_is_not_waited_for() -> None:
    proposer = Proposer(kind="stop", nodes={0, 1})
    (tell,) = proposer.request(0.0)
    assert proposer.vote(0, tell.word, Vote(answer="ok", furthest=0), 0.1) == []
    (outcome,) = proposer.gone(1, 0.2)
    assert (outcome.verb, outcome.nodes) == ("confirm", (0,))


def test_a_vote_that_takes_too_long_is_revoked_and_tried_again() -> None:
    proposer = Proposer(kind="stop", nodes={0, 1})
    (first,) = proposer.request(0.0)
    (revoke,) = proposer.tick(decide.VOTES_WITHIN_S + 0.01)
    assert (revoke.verb, revoke.word) == ("revoke", first.word)
    (again,) = proposer.tick(decide.VOTES_WITHIN_S + 1.0)
    assert again.verb == "propose"
    assert again.word != first.word
    assert proposer.vote(0, first.word, Vote(answer="ok"), 6.0) == []  # an answer to what was revoked


def test_the_check_catches_ranks_that_act_at_any_boundary_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decide.look
    monkeypatch.setattr(decide, "look", lambda word, _before, boundary, done: right(word, -1, boundary, done))
    assert any(torn(seed) for seed in range(500))


@pytest.mark.long
@settings(max_examples=5000, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_all_ranks_act_at_the_same_boundary_long(seed: int) -> None:
    play(seed).check()
