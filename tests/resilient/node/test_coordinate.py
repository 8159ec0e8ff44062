"""The state machines of a save, without processes: gathering on a node, coordinating over nodes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard, Slot, TensorInfo
from resilient.errors import RanksDisagree, SaveFailed, SnapshotTorn, StepExists, WireError
from resilient.node.coordinate import Begin, Commit, Coordinator, Fail, Prepare, Written
from resilient.node.gather import Gathering, Sealed, Void, Whole
from resilient.node.messages import (
    Facts,
    SaveId,
    check_slots,
    decode_facts,
    decode_slots,
    decode_values,
    encode_facts,
    encode_slots,
    encode_values,
)

X, Y = SaveId(1, "a" * 16), SaveId(2, "b" * 16)
FACTS = Facts(writers=2, members=4, layout={"ranks": 4})


def part(facts: Facts = FACTS) -> Sealed:
    return Sealed(facts=facts, memory=memoryview(b""), slots=(), values=())


def written(size: int = 1) -> Written:
    return Written(index={}, raw_bytes=size, stored_bytes=size, persist_s=0.0)


# ---- one node
def test_a_save_is_whole_when_every_rank_has_sealed() -> None:
    gathering = Gathering({0: 4, 1: 5}, seal_timeout_s=10)
    assert gathering.seal(1, X, part(), 0.0) == []
    (whole,) = gathering.seal(0, X, part(), 1.0)
    assert isinstance(whole, Whole)
    assert set(whole.parts) == {0, 1}
    assert gathering.waiting == ()


def test_a_dead_rank_voids_what_it_has_not_sealed_and_nothing_else() -> None:
    gathering = Gathering({0: 4, 1: 5}, seal_timeout_s=10)
    gathering.seal(1, X, part(), 0.0)
    gathering.seal(0, Y, part(), 0.0)
    (void,) = gathering.gone(1, "(process 77) died")
    assert isinstance(void, Void)
    assert void.save == Y
    assert "rank 5 (process 77) died" in void.error.what
    (whole,) = gathering.seal(0, X, part(), 1.0)  # the dead rank had sealed this one
    assert isinstance(whole, Whole)
    (later,) = gathering.seal(0, SaveId(3, "c" * 16), part(), 2.0)
    assert isinstance(later, Void)


def test_seals_may_overtake_each_other() -> None:
    gathering = Gathering({0: 0, 1: 1}, seal_timeout_s=10)
    assert gathering.seal(1, X, part(), 0.0) == []
    assert gathering.seal(1, Y, part(), 0.0) == []  # rank 1 is ahead
    assert [type(r) for r in gathering.seal(0, X, part(), 0.0)] == [Whole]
    assert [type(r) for r in gathering.seal(0, Y, part(), 0.0)] == [Whole]


@given(st.integers(0, 2**32))
def test_a_skipped_save_is_voided_and_the_others_become_whole_in_any_order_of_messages(seed: int) -> None:
    chance = random.Random(seed)
    ranks, saves = chance.randint(2, 4), [SaveId(step, "a" * 16) for step in range(chance.randint(1, 4))]
    queues = {rank: [save for save in saves if chance.random() < 0.8] for rank in range(ranks)}
    full = [save for save in saves if all(save in queue for queue in queues.values())]
    gathering = Gathering({rank: rank for rank in range(ranks)}, seal_timeout_s=10)
    whole, void = [], []
    while any(queues.values()):
        rank = chance.choice([rank for rank, queue in queues.items() if queue])
        for result in gathering.seal(rank, queues[rank].pop(0), part(), 0.0):
            (whole if isinstance(result, Whole) else void).append(result.save)
    assert sorted(whole) == full
    assert not set(void) & set(full)
    for result in gathering.tick(11.0):  # what nobody could tell to be skipped waits for its deadline
        void.append(result.save)
    assert gathering.waiting == ()


def test_a_save_waits_for_its_last_rank_only_so_long() -> None:
    gathering = Gathering({0: 0, 1: 1}, seal_timeout_s=10)
    gathering.seal(0, X, part(), 5.0)
    assert gathering.tick(14.9) == []
    (void,) = gathering.tick(15.0)
    assert "ranks [1]" in void.error.what if isinstance(void, Void) else False
    (late,) = gathering.seal(1, X, part(), 16.0)
    assert isinstance(late, Void)


def test_a_save_that_is_over_stays_over() -> None:
    gathering = Gathering({0: 0}, seal_timeout_s=10)
    assert isinstance(gathering.seal(0, X, part(), 0.0)[0], Whole)
    assert isinstance(gathering.seal(0, X, part(), 0.0)[0], Void)
    assert gathering.void(X, SaveFailed("again")) == []


# ---- all nodes
def test_the_life_of_a_save() -> None:
    coordinator = Coordinator(2, seal_timeout_s=10)
    assert coordinator.sealed(1, X, FACTS, 0.0) == []
    loss = Facts(writers=2, members=4, layout={"ranks": 4}, metrics={"loss": 1.0})
    assert coordinator.sealed(0, X, loss, 1.0) == [Prepare(save=X, facts=loss)]  # metrics are rank 0's
    assert coordinator.prepared(X, 7) == [Begin(save=X, generation=7)]
    assert coordinator.written(1, X, written(1)) == []
    (commit,) = coordinator.written(0, X, written(2))
    assert commit == Commit(save=X, facts=loss, generation=7, parts=(written(2), written(1)), began_s=0.0)
    coordinator.committed(X)
    assert coordinator.under_way == ()


def test_a_lost_node_fails_what_it_has_not_written_and_nothing_else() -> None:
    coordinator = Coordinator(2, seal_timeout_s=10)
    for save in (X, Y):
        for node in (0, 1):
            coordinator.sealed(node, save, FACTS, 0.0)
        coordinator.prepared(save, 7)
    coordinator.written(1, X, written())
    (fail,) = coordinator.lost(1, WireError("connection reset"))
    assert isinstance(fail, Fail)
    assert fail.save == Y
    assert "node 1" in fail.error.what
    assert [type(action) for action in coordinator.written(0, X, written())] == [Commit]
    third = SaveId(3, "c" * 16)
    (refused,) = coordinator.sealed(0, third, FACTS, 1.0)
    assert isinstance(refused, Fail)


def test_a_save_fails_once_for_everyone_and_late_nodes_hear_why() -> None:
    coordinator = Coordinator(2, seal_timeout_s=10)
    coordinator.sealed(0, X, FACTS, 0.0)
    assert coordinator.void(X, SnapshotTorn("torn")) == [
        Fail(save=X, error=coordinator._ended[X]),
    ]
    assert coordinator.void(X, SaveFailed("again")) == []
    (late,) = coordinator.sealed(1, X, FACTS, 1.0)
    assert isinstance(late, Fail)
    assert (late.nodes, type(late.error)) == ((1,), SnapshotTorn)


def test_a_node_may_fail_a_save_before_it_has_begun() -> None:
    coordinator = Coordinator(2, seal_timeout_s=10)
    assert [type(a) for a in coordinator.void(X, SnapshotTorn("torn"))] == [Fail]
    assert [type(a) for a in coordinator.sealed(0, X, FACTS, 0.0)] == [Fail]


def test_once_it_is_being_committed_only_the_log_decides() -> None:
    coordinator = Coordinator(1, seal_timeout_s=10)
    facts = Facts(writers=1, members=1)
    coordinator.sealed(0, X, facts, 0.0)
    coordinator.prepared(X, 7)
    coordinator.written(0, X, written())
    assert coordinator.void(X, SaveFailed("too late")) == []
    assert coordinator.lost(0, WireError("gone")) == []
    assert coordinator.tick(1000.0) == []
    (fail,) = coordinator.fail(X, StepExists("known"))
    assert isinstance(fail, Fail)


def test_nodes_that_disagree_fail_the_save() -> None:
    coordinator = Coordinator(2, seal_timeout_s=10)
    coordinator.sealed(0, X, FACTS, 0.0)
    (fail,) = coordinator.sealed(1, X, Facts(writers=2, members=8), 0.0)
    assert isinstance(fail, Fail)
    assert type(fail.error) is RanksDisagree


def test_a_node_that_never_seals_fails_the_save_in_time() -> None:
    coordinator = Coordinator(3, seal_timeout_s=10)
    facts = Facts(writers=3, members=3)
    coordinator.sealed(1, X, facts, 0.0)
    assert coordinator.tick(9.9) == []
    (fail,) = coordinator.tick(10.0)
    assert isinstance(fail, Fail)
    assert "nodes [0, 2]" in fail.error.what


# ---- what travels
def test_facts_slots_and_values_travel_unchanged() -> None:
    facts = Facts(writers=1, members=2, restored=(3, 4), source="s", formation=1, replace=True, metrics={"a": 0.5})
    assert decode_facts(encode_facts(facts)) == facts
    nan = Facts(writers=1, members=2, metrics={"a": float("nan"), "b": 1.0})
    assert decode_facts(encode_facts(nan)).metrics == {"b": 1.0}
    info = TensorInfo(name="w", dtype="bfloat16", shape=(4, 6))
    slots = tuple(Slot(shard=Shard(tensor=info, box=Box((row, 0), (1, 6))), offset=row * 64) for row in range(4))
    assert decode_slots(encode_slots(slots)) == slots
    values = [("a", None, b"1"), ("b", 3, b""), ("a", 0, b"\x00\xff")]
    assert list(decode_values(*encode_values(values))) == values


@pytest.mark.parametrize("damaged", [b"", b"[]", b'{"tensors":[],"slots":[[0,[0],[1],0]]}', b"\xff", b'{"slots":3}'])
def test_layouts_that_cannot_be_read_are_refused(damaged: bytes) -> None:
    with pytest.raises(WireError):
        decode_slots(damaged)


@pytest.mark.parametrize("table", [None, 3, [["a"]], [["a", None, 5]], [["a", None, -1]], [[1, None, 1]], []])
def test_values_that_do_not_add_up_are_refused(table: object) -> None:
    with pytest.raises(WireError):
        decode_values(table, b"1234")


def test_a_slot_that_leaves_its_arena_is_refused() -> None:
    info = TensorInfo(name="w", dtype="float32", shape=(4,))
    for offset in (-1, 85):
        slot = Slot(shard=Shard(tensor=info, box=Box((0,), (4,))), offset=offset)
        with pytest.raises(WireError, match="outside an arena"):
            check_slots([slot], 100)
