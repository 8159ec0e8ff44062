"""The shared page: records are never torn, decisions reach ranks cheaply, waiting is bounded."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilient.detect import decide
from resilient.detect.progress import KeeperPage, Page, ProgressPage
from resilient.errors import KeeperLost, LoopMisused, WireError


@pytest.fixture
def page() -> Iterator[KeeperPage]:
    keeper = KeeperPage(2)
    yield keeper
    keeper.close()


@pytest.fixture
def rank(page: KeeperPage) -> Iterator[ProgressPage]:
    mine = ProgressPage(os.dup(page.fd), 1)
    yield mine
    mine.close()


def test_what_a_rank_publishes_its_keeper_reads(page: KeeperPage, rank: ProgressPage) -> None:
    assert page.progress(1) is None
    rank.generation = 7
    rank.publish(12)
    rank.enter("evaluate")
    seen = page.progress(1)
    assert seen is not None
    assert (seen.generation, seen.step, seen.phase) == (7, 12, "evaluate")
    assert 0 <= time.monotonic_ns() - seen.mono_ns < 10**9
    rank.leave()
    after = page.progress(1)
    assert after is not None
    assert after.phase == "step"
    assert page.progress(0) is None


def test_readers_never_see_half_a_record(page: KeeperPage) -> None:
    """Another process writes records whose fields belong together, as fast as it can."""
    child = os.fork()
    if child == 0:
        mine = ProgressPage(os.dup(page.fd), 1)
        for step in range(10**9):
            mine.generation = step
            mine.hook_ns = step
            mine.publish(step)
    try:
        deadline, seen = time.monotonic() + 20.0, set()
        while len(seen) < 30 and time.monotonic() < deadline:
            record = page.progress(1)
            if record is not None:
                assert record.generation == record.step == record.hook_ns
                seen.add(record.step)
        assert len(seen) == 30
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_rank_killed_in_the_middle_of_a_write_leaves_its_last_whole_record(
    page: KeeperPage, rank: ProgressPage
) -> None:
    rank.publish(3)
    rank.publish(4)
    older = rank._base + 8  # where the next record goes
    rank._words[older] = 3
    rank._words[older + 2] = 99
    seen = page.progress(1)
    assert seen is not None
    assert seen.step == 4


def test_decisions_cost_next_to_nothing_when_there_is_none(rank: ProgressPage) -> None:
    best = min(_seconds(rank) for _ in range(5))
    assert best < 5e-6


def _seconds(rank: ProgressPage) -> float:
    begun = time.perf_counter()
    for step in range(2000):
        rank.decision_at(step)
    return (time.perf_counter() - begun) / 2000


def test_a_confirmed_decision_is_given_once_at_its_boundary(page: KeeperPage, rank: ProgressPage) -> None:
    word = decide.Decision(kind="save", step=5, number=1).word
    assert page.swap("save", 0, decide.become(word, decide.CONFIRMED))
    assert [rank.decision_at(step) for step in range(4, 8)] == [None, "save", None, None]
    assert page.position(1, "save").done == decide.become(word, decide.CONFIRMED)


def test_a_rank_that_begins_later_is_not_concerned_by_a_decision_about_an_earlier_boundary(
    page: KeeperPage, rank: ProgressPage
) -> None:
    # Ranks that began at different boundaries would each act at their own first one.
    decision = decide.Decision(kind="stop", step=1, number=1, state=decide.CONFIRMED)
    page.swap("stop", 0, decision.word)
    rank.begin(100)
    assert page.position(1, "stop").boundary == 100
    assert rank.decision_at(101) is None


def test_stop_outranks_save_at_the_same_boundary(page: KeeperPage, rank: ProgressPage) -> None:
    for kind in decide.KINDS:
        word = decide.Decision(kind=kind, step=2, number=1).word
        assert page.swap(kind, 0, decide.become(word, decide.CONFIRMED))
    assert rank.decision_at(2) == "stop"
    assert rank.decision_at(3) is None


def test_a_rank_waits_for_the_outcome_of_a_vote(page: KeeperPage, rank: ProgressPage) -> None:
    word = decide.Decision(kind="stop", step=2, number=1).word
    assert page.swap("stop", 0, word)
    held = threading.Event()

    def confirm_once_held() -> None:
        while page.position(1, "stop").held != word:
            time.sleep(0.0005)
        held.set()
        page.swap("stop", word, decide.become(word, decide.CONFIRMED))

    thread = threading.Thread(target=confirm_once_held)
    thread.start()
    assert rank.decision_at(2) == "stop"
    thread.join()
    assert held.is_set()


def test_alone_on_its_node_a_rank_abandons_what_a_dead_keeper_left(page: KeeperPage, rank: ProgressPage) -> None:
    word = decide.Decision(kind="save", step=2, number=1).word
    assert page.swap("save", 0, word)
    rank.alive = lambda: False
    assert rank.decision_at(2) is None
    assert page.decision("save") == decide.become(word, decide.ABANDONED)
    other = ProgressPage(os.dup(page.fd), 0)
    assert other.decision_at(2) is None  # and so does every other rank of the node
    other.close()


def test_a_rank_gives_up_after_its_deadline(page: KeeperPage, rank: ProgressPage) -> None:
    assert page.swap("save", 0, decide.Decision(kind="save", step=2, number=1).word)
    rank.hold_within_s = 0.05
    begun = time.monotonic()
    assert rank.decision_at(2) is None
    assert time.monotonic() - begun < 2.0


def test_with_other_nodes_a_rank_in_doubt_says_so(page: KeeperPage) -> None:
    word = decide.Decision(kind="save", step=2, number=1).word
    assert page.swap("save", 0, word)
    for slot in (0, 1):
        rank = ProgressPage(os.dup(page.fd), slot, alone=False, alive=lambda: False)
        with pytest.raises(KeeperLost, match="being decided"):
            rank.decision_at(2)
        rank.close()


def test_two_processes_never_both_win_a_swap(page: KeeperPage) -> None:
    """Each tries to turn a tentative word into its own outcome; exactly one does, each round."""
    rounds = 200
    child = os.fork()
    if child == 0:
        try:
            mine = Page(os.dup(page.fd))
            wins = 0
            for number in range(1, rounds + 1):
                word = decide.Decision(kind="save", step=1, number=number).word
                while mine.decision("save") >> 2 < word >> 2:
                    pass
                wins += mine.swap("save", word, decide.become(word, decide.ABANDONED), deadline_s=10.0)
            os._exit(min(250, wins))
        finally:
            os._exit(255)
    lost = 0
    for number in range(1, rounds + 1):
        word = decide.Decision(kind="save", step=1, number=number).word
        assert page.swap("save", page.decision("save"), word, deadline_s=10.0)
        lost += not page.swap("save", word, decide.become(word, decide.CONFIRMED), deadline_s=10.0)
        while page.decision("save") == word:
            pass
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == lost


def test_the_seventeenth_phase_is_refused(rank: ProgressPage) -> None:
    for number in range(14):  # two have numbers of their own
        rank.enter(f"phase {number}")
    with pytest.raises(LoopMisused, match="at most 16"):
        rank.enter("one more")


def test_a_descriptor_that_is_no_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    with pytest.raises(WireError, match="not a progress page"):
        Page(os.open(path, os.O_RDWR))
    left, right = socket.socketpair()
    with right, pytest.raises(WireError):
        Page(left.detach())
