"""The save plan: every element written once, by one who holds it, level; disagreements refused."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.geometry import Box, missing, whole
from resilient.checkpoint.items import RankState, Shard, TensorInfo, ValueInfo
from resilient.checkpoint.plan_assign import MIN_CUT_BYTES, assign, level
from resilient.checkpoint.plan_save import check_values, fingerprint, plan_save
from resilient.errors import RanksDisagree, ShardsDisagree, ValuesDiffer
from tests.resilient.checkpoint.layouts import box_on_mesh, infos, laid_out


def times_written(plan, info):
    times = np.zeros(info.shape, int)
    for shards in plan.shards:
        for shard in shards:
            if shard.tensor == info:
                times[shard.box.slices()] += 1
    return times


def state(rank, *shards, values=()):
    return RankState(rank=rank, node=0, shards=shards, values=values)


def part(name, shape, start, lengths, dtype="float32"):
    return Shard(tensor=TensorInfo(name=name, dtype=dtype, shape=shape), box=Box(start, lengths))


@given(infos().flatmap(lambda tensors: st.tuples(st.just(tensors), laid_out(tensors))))
def test_every_element_is_written_once_by_a_rank_that_holds_it(case):
    tensors, ranks = case
    plan = plan_save(ranks)
    for info in tensors:
        assert (times_written(plan, info) == 1).all()
        assert any(shard.tensor == info for shards in plan.shards for shard in shards), "unknown to the index"
    for held, shards in zip(ranks, plan.shards, strict=True):
        mine = {shard.tensor.name: shard.box for shard in held.shards}
        for shard in shards:
            assert shard.box.relative_to(mine[shard.tensor.name])
            assert shard.nbytes or not math.prod(shard.tensor.shape)
    written = [sum(shard.nbytes for shard in shards) for shards in plan.shards]
    assert written == list(plan.bytes_by_rank)


@given(infos().flatmap(laid_out), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_the_descriptions(ranks, order):
    plan = plan_save(ranks)
    shuffled = plan_save(order.sample(ranks, len(ranks)))
    assert shuffled.fingerprint == plan.fingerprint
    assert list(shuffled.shards) == list(plan.shards)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_bytes_are_level_within_5_percent_on_even_meshes(sizes, data):
    tensors = []
    for i in range(data.draw(st.integers(1, 12))):
        shape = tuple(data.draw(st.sampled_from([768, 1536, 3072, 12288])) for _ in range(data.draw(st.integers(1, 2))))
        placements = [data.draw(st.sampled_from([None, *range(len(shape))])) for _ in sizes]
        tensors.append((TensorInfo(name=f"t{i}", dtype="float32", shape=shape), placements))
    ranks = [
        state(
            rank,
            *(Shard(tensor=t, box=box_on_mesh(t.shape, sizes, at, p, range(len(sizes)))) for t, p in tensors),
        )
        for rank, at in enumerate(itertools.product(*map(range, sizes)))
    ]
    plan = plan_save(ranks)
    mean = sum(t.nbytes for t, _ in tensors) / len(ranks)
    assert max(plan.bytes_by_rank) <= 1.05 * mean + 2 * MIN_CUT_BYTES
    shards = [shard for mine in plan.shards for shard in mine]
    for info, _ in tensors:
        written = [shard.box for shard in shards if shard.tensor == info]
        assert not missing(written, whole(info.shape))
        assert sum(box.size for box in written) == math.prod(info.shape)


def lightest_possible(ranks, nbytes_of):
    """The least that the most loaded rank can have: what only a set of ranks holds must be written by that set."""
    holders = {}
    for held in ranks:
        for shard in held.shards:
            holders.setdefault((shard.tensor.name, shard.box), set()).add(held.rank)
    subsets = [set(s) for n in range(1, len(ranks) + 1) for s in itertools.combinations(range(len(ranks)), n)]
    return max(sum(nbytes_of(key) for key, who in holders.items() if who <= s) / len(s) for s in subsets)


@settings(max_examples=60)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=8), st.data())
def test_no_division_could_be_much_more_level_however_the_holders_cross(holders, data):
    lines = [data.draw(st.integers(1, 2000)) for _ in holders]
    ranks = [
        state(
            r,
            *(
                part(f"t{i}", (n, 1024), (0, 0), (n, 1024))
                for i, (n, s) in enumerate(zip(lines, holders, strict=True))
                if r in s
            ),
        )
        for r in range(6)
    ]
    least = lightest_possible(ranks, lambda key: key[1].size * 4)
    assert max(plan_save(ranks).bytes_by_rank) <= 1.05 * least + 2 * MIN_CUT_BYTES


def test_tensors_replicated_over_different_axes_level_out():
    """Filling one set of holders after the other left ranks 2 and 3 with 66% more than ranks 0 and 1."""
    rows = [part("a", (768, 768), (384 * (rank // 2), 0), (384, 768)) for rank in range(4)]
    columns = [part("b", (768, 768), (0, 384 * (rank % 2)), (768, 384)) for rank in range(4)]
    plan = plan_save([state(rank, rows[rank], columns[rank]) for rank in range(4)])
    assert max(plan.bytes_by_rank) <= 1.05 * 2 * 768 * 768 * 4 / 4


def test_levelling_goes_on_until_little_moves():
    """The worst of 1,500 random cases: after two rounds one rank still has 22% more than need be."""
    holders = [(2, 5), (2, 6), (0, 1, 7), (1, 5, 6), (2, 3, 7), (2, 4, 5), (3, 4, 7), (3, 5, 6), (3, 5, 7)]
    lines = [3000, 100, 1000, 3000, 3000, 100, 3000, 3000, 10000]
    shards = [part(f"t{i}", (n, 1024), (0, 0), (n, 1024)) for i, n in enumerate(lines)]
    ranks = [state(r, *(shard for shard, who in zip(shards, holders, strict=True) if r in who)) for r in range(8)]
    least = lightest_possible(ranks, lambda key: key[1].size * 4)
    assert max(plan_save(ranks).bytes_by_rank) <= 1.05 * least


def test_a_line_longer_than_a_share_is_cut_inside():
    ranks = [state(rank, part("w", (3, 1 << 20), (0, 0), (3, 1 << 20))) for rank in range(2)]
    assert max(plan_save(ranks).bytes_by_rank) <= 1.05 * 3 * (1 << 20) * 4 / 2


def test_who_holds_all_and_those_who_hold_parts_share_the_work():
    shape = (4000, 1024)
    quarters = [state(1 + i, part("w", shape, (1000 * i, 0), (1000, 1024))) for i in range(3)]
    plan = plan_save([state(0, part("w", shape, (0, 0), shape)), *quarters])
    assert max(plan.bytes_by_rank) <= 1.05 * 4000 * 1024 * 4 / 4


def test_one_huge_tensor_is_divided_between_its_replicas_along_lines():
    ranks = [state(rank, part("w", (1000, 4096), (0, 0), (1000, 4096))) for rank in range(8)]
    plan = plan_save(ranks)
    assert [len(shards) for shards in plan.shards] == [1] * 8
    assert all(shards[0].box.shape[1] == 4096 for shards in plan.shards)
    assert max(plan.bytes_by_rank) <= 1.05 * 1000 * 4096 * 4 / 8


def test_small_tensors_stay_whole():
    ranks = [state(rank, *(part(f"b{i}", (1024,), (0,), (1024,)) for i in range(100))) for rank in range(4)]
    plan = plan_save(ranks)
    assert sorted(len(shards) for shards in plan.shards) == [25] * 4
    assert all(shard.box == whole((1024,)) for shards in plan.shards for shard in shards)


def test_who_has_no_choice_comes_first_and_others_make_up_for_it():
    shape = (1 << 20,)
    alone, both = part("a", shape, (0,), shape), part("b", shape, (0,), shape)
    plan = plan_save([state(0, alone, both), state(1, both)])
    assert [shard.tensor.name for shard in plan.shards[1]] == ["b"]
    assert plan.bytes_by_rank == (4 << 20, 4 << 20)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.integers(0, 5000))
def test_filling_up_reaches_one_level_and_loses_nothing(loads, total):
    shares = level(np.asarray(loads, np.int64), total)
    assert shares.sum() == total
    assert (shares >= 0).all()
    filled = np.asarray(loads) + shares
    raised = filled[shares > 1]
    assert not len(raised) or raised.max() - filled.min() <= 2


@given(st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 3)), max_size=30), st.integers(1, 4096))
def test_an_assignment_gives_each_byte_to_one_member(items, grain):
    sets = ((0,), (1, 2), (0, 3), (0, 1, 2, 3))
    nbytes = np.asarray([n for n, _ in items], np.int64)
    found = assign(nbytes, np.asarray([s for _, s in items], np.int64), sets, 4, lambda _item, _limit: grain)
    for index, (n, number) in enumerate(items):
        cuts = sorted((cut.low, cut.high, cut.rank) for cut in found.cuts if cut.item == index)
        if found.rank[index] >= 0:
            cuts = [(0, n, int(found.rank[index]))]
        assert [low for low, _, _ in cuts] == [0, *(high for _, high, _ in cuts[:-1])]
        assert cuts[-1][1] == n
        assert {rank for _, _, rank in cuts} <= set(sets[number])
        assert (len(cuts) == 1) == (found.rank[index] >= 0), "a whole item is not a cut"
    assert found.loads.sum() == nbytes.sum()


@given(infos(max_size=6).flatmap(lambda t: st.tuples(st.just(t), laid_out(t), laid_out(t))))
def test_boxes_that_overlap_in_part_are_cut(case):
    tensors, some, others = case
    more = [replace(other, rank=len(some) + other.rank) for other in others]
    plan = plan_save([*some, *more])
    for info in tensors:
        assert (times_written(plan, info) == 1).all()


def test_a_tensor_without_elements_is_known_through_its_lowest_holder():
    empty = part("e", (0, 4), (0, 0), (0, 4))
    plan = plan_save([state(0), state(1, empty), state(2, empty)])
    assert list(plan.shards) == [(), (empty,), ()]


def test_an_empty_tensors_speaker_gives_a_box_of_its_own():
    def empty(name, column):
        return part(name, (0, 2), (0, column), (0, 1))

    # The box at column 1 is known from rank 0's other tensor before rank 0's own box of t is.
    plan = plan_save([state(0, empty("s", 1), empty("t", 0)), state(1, empty("t", 1))])
    assert list(plan.shards) == [(empty("s", 1), empty("t", 0)), ()]


def test_the_same_box_is_not_enough_for_a_larger_tensor():
    """Tensors share a layout only if their shapes are equal too."""
    with pytest.raises(ShardsDisagree, match=r"no rank holds \[4:8\] of 'b'"):
        plan_save([state(0, part("a", (4,), (0,), (4,)), part("b", (8,), (0,), (4,)))])


def test_boxes_on_the_diagonal_leave_holes():
    """Their intervals cover each dim, and yet half of the cells of the grid have no holder."""
    with pytest.raises(ShardsDisagree, match=r"no rank holds \[0:2, 2:4\]"):
        plan_save([state(rank, part("w", (4, 4), (2 * rank, 2 * rank), (2, 2))) for rank in range(2)])


def test_an_overlap_does_not_make_up_for_a_hole_of_its_size():
    with pytest.raises(ShardsDisagree, match=r"no rank holds \[3:4\]"):
        plan_save([state(rank, part("w", (4,), (rank,), (2,))) for rank in range(2)])


def test_elements_without_a_holder_are_refused_with_their_place():
    ranks = [state(0, part("w", (10, 4), (0, 0), (4, 4))), state(1, part("w", (10, 4), (6, 0), (4, 4)))]
    with pytest.raises(ShardsDisagree, match=r"no rank holds \[4:6, 0:4\] of 'w' .*ranks 0, 1 hold"):
        plan_save(ranks)
    with pytest.raises(ShardsDisagree, match=r"no rank holds \[0:4\] of 'e'"):
        plan_save([state(0, part("e", (4,), (4,), (0,)))])


@pytest.mark.parametrize("other", [("w", (5,), "float32"), ("w", (4,), "bfloat16")])
def test_a_tensor_described_differently_is_refused_with_both(other):
    name, shape, dtype = other
    ranks = [state(0, part("w", (4,), (0,), (4,))), state(1, part(name, shape, (0,), shape, dtype))]
    with pytest.raises(ShardsDisagree, match=rf"rank 0 has 'w' as float32 of shape \(4,\), rank 1 as {dtype}"):
        plan_save(ranks)


@pytest.mark.parametrize("numbers", [(0, 0), (0, 2), (1,)])
def test_ranks_must_be_complete(numbers):
    with pytest.raises(RanksDisagree, match="once each"):
        plan_save([state(rank) for rank in numbers])


def value(name, digest="d", rank=None):
    return ValueInfo(name=name, digest=digest, rank=rank)


def test_values_are_handed_over_once_and_own_ones_by_each():
    ranks = [state(0, values=(value("rng", rank=0),)), *(
        state(rank, values=(value("lr"), value("rng", rank=rank))) for rank in (1, 2)
    )]  # fmt: skip
    assert plan_save(ranks).values == ((("rng", 0),), (("lr", None), ("rng", 1)), (("rng", 2),))


def test_values_that_differ_are_named_with_their_ranks():
    check_values([state(0, values=(value("s/lr"),)), state(1, values=(value("s/lr"),)), state(2)])
    with pytest.raises(ValuesDiffer, match=r"'s/lr' is not the same on all ranks: rank 0 and rank 2"):
        check_values([state(r, values=(value("s/lr", "x" if r == 2 else "d"),)) for r in range(4)])
    with pytest.raises(ValuesDiffer, match="marked PerRank on rank 1 and shared on rank 0"):
        check_values([state(0, values=(value("n"),)), state(1, values=(value("n", rank=1),))])


def test_a_fingerprint_changes_with_the_layout_and_not_with_values():
    one = state(0, part("w", (4,), (0,), (4,)), values=(value("lr"),))
    assert fingerprint(one) == fingerprint(state(0, *one.shards, values=(value("lr", "other"),)))
    different = [
        state(1, *one.shards, values=one.values),
        state(0, part("w", (4,), (0,), (3,)), values=one.values),
        state(0, part("w", (4,), (0,), (4,), "int32"), values=one.values),
        state(0, part("v", (4,), (0,), (4,)), values=one.values),
        state(0, *one.shards),
    ]
    assert len({fingerprint(each) for each in [one, *different]}) == 6


def grown(tensors, replicas, shards, tp):
    """A hybrid-sharded, tensor-parallel world; ranks share the descriptions of tensors."""
    described = [
        TensorInfo(name=f"model/layers.{i}.weight", dtype="float32", shape=(16384, 4096) if i % 3 else (16384,))
        for i in range(tensors)
    ]
    rows, columns = 16384 // shards, 4096 // tp
    ranks = []
    for rank in range(replicas * shards * tp):
        row, column = rank // tp % shards * rows, rank % tp * columns
        boxes = {1: Box((row,), (rows,)), 2: Box((row, column), (rows, columns))}
        ranks.append(state(rank, *(Shard(tensor=t, box=boxes[len(t.shape)]) for t in described)))
    return ranks


def seconds_to_plan(ranks):
    begun = time.process_time()
    plan = plan_save(ranks)
    plan.shards[0]
    return time.process_time() - begun, plan


def test_planning_costs_microseconds_per_shard():
    spent, plan = seconds_to_plan(grown(250, 4, 16, 4))
    assert max(plan.bytes_by_rank) <= 1.05 * sum(plan.bytes_by_rank) / 256
    assert spent < 64_000 * 20e-6, f"{spent:.2f} s for 64,000 shards"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_4096_ranks_of_2000_tensors_plan_in_seconds():
    spent, plan = seconds_to_plan(grown(2000, 8, 64, 8))
    assert max(plan.bytes_by_rank) <= 1.05 * sum(plan.bytes_by_rank) / 4096
    assert spent < 30, f"{spent:.1f} s"


def test_random_mixtures_of_tensors_level_out_over_many_ranks():
    seed = random.Random(5)
    tensors = [
        TensorInfo(name=f"t{i}", dtype="float32", shape=(seed.choice([1000, 4096, 50_000]), 64)) for i in range(40)
    ]
    ranks = [state(rank, *(Shard(tensor=t, box=whole(t.shape)) for t in tensors)) for rank in range(16)]
    plan = plan_save(ranks)
    assert max(plan.bytes_by_rank) <= 1.05 * sum(plan.bytes_by_rank) / 16
    assert sum(len(shards) for shards in plan.shards) <= len(tensors) + 15
