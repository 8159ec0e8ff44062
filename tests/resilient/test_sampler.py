"""The order of samples, and what counts as consumed."""

from __future__ import annotations

import gc
import multiprocessing
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset

from resilient import Sampler
from resilient.checkpoint import rng, values
from resilient.errors import LoopMisused, SamplerStale, StateInvalid, StateMismatch
from resilient.order import TABLE_SIZE_MAX, ordered, permuted


class Numbers(Dataset):
    """Item i is i; its loader yields the indices themselves."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


class Noisy(Numbers):
    """Item i with augmentation noise from every generator."""

    def __getitem__(self, index):
        return [index, random.random(), np.random.normal(), torch.rand(()).item()]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(int, 1)


def take(iterator, n):
    return [next(iterator).tolist() for _ in range(n)]


def flat(batches):
    return [index for batch in batches for index in batch]


def loader_of(sampler, **options):
    return DataLoader(Numbers(sampler.size), batch_sampler=sampler, **options)


# ---- order
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_each_epoch_is_a_permutation(size, key):
    assert sorted(permuted(np.arange(size, dtype=np.uint64), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [TABLE_SIZE_MAX + 1, 3 * TABLE_SIZE_MAX, 2**18])
def test_a_large_epoch_is_a_permutation_without_a_table_and_well_mixed(size):
    drawn = permuted(np.arange(size, dtype=np.uint64), size, 7).astype(np.int64)
    assert np.array_equal(np.sort(drawn), np.arange(size))
    # Neighbours land anywhere: mean distance of a random permutation is size / 3, displacement likewise.
    assert abs(np.abs(np.diff(drawn)).mean() / size - 1 / 3) < 0.01
    assert abs(np.abs(drawn - np.arange(size)).mean() / size - 1 / 3) < 0.01
    # Every tenth of the order draws evenly from every tenth of the data (chi-square, 81 degrees of freedom).
    counts = np.histogram2d(np.arange(size), drawn, bins=10)[0]
    expected = size / 100
    assert ((counts - expected) ** 2 / expected).sum() < 150


def test_every_order_of_a_tiny_set_is_about_equally_likely():
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        order = tuple(ordered(np.arange(4), 4, seed))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert max(seen.values()) < 90
    assert min(seen.values()) > 20


def test_the_order_is_fixed_for_ever():
    """Data order is part of what a checkpoint means: these numbers must not change."""
    assert ordered(np.arange(10), 10, 0) == [1, 0, 9, 7, 5, 8, 3, 2, 6, 4]
    positions = np.array([0, 1, 10**12, 10**12 + 1])
    assert ordered(positions, 10**12, 3) == [589978385518, 124966863949, 69494236420, 397365418388]


def test_a_trillion_samples_need_no_memory():
    drawn = ordered(np.arange(1000), 10**12, 5)
    assert len(set(drawn)) == 1000
    assert max(drawn) < 10**12
    assert max(drawn) - min(drawn) > 9 * 10**11


# ---- sharing
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_the_ranks_share_each_global_batch_and_the_world_plays_no_part(world, micro_batch):
    size, batch, steps = 23, 8, 7
    alone = iter(Sampler(size, batch, 1, rank=0, world=1))
    streams = [Sampler(size, batch, 1, rank=rank, world=world).draws(micro_batch) for rank in range(world)]
    shares = [Sampler(size, batch, 1, rank=rank, world=world).shares(micro_batch) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for _ in range(steps):
        together = []
        for stream, share in zip(streams, shares, strict=True):
            for part in share:
                drawn = next(stream)
                assert len(drawn) == max(1, part.count)
                together += drawn[: part.count]
        assert together == next(alone)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40), batch=st.integers(1, 13), seed=st.integers(0, 99), shuffle=st.booleans(),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=4),
)  # fmt: skip
def test_whatever_the_worlds_each_sample_comes_exactly_once_per_epoch(size, batch, seed, shuffle, worlds):
    history: list[int] = []
    state = None
    for world, steps in worlds:
        ranks = [Sampler(size, batch, seed, rank=rank, world=world, shuffle=shuffle) for rank in range(world)]
        if state is not None:
            for sampler in ranks:
                sampler.load_state_dict(values.decode(state))
        streams = [sampler.batches(loader_of(sampler)) for sampler in ranks]
        for _ in range(steps):
            for sampler, stream in zip(ranks, streams, strict=True):
                history += take(stream, 1)[0][: sampler.place.share(batch)[1]]
        states = {values.encode(sampler.state_dict()) for sampler in ranks}
        (state,) = states
    assert ranks[0].consumed == len(history)
    for start in range(0, len(history) - size + 1, size):
        assert sorted(history[start : start + size]) == list(range(size))
    assert history == ordered(np.arange(len(history)), size, seed, shuffle=shuffle)


# ---- consumed
@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_prefetched_does_not_count(workers):
    sampler = Sampler(50, 4, 3)
    batches = sampler.batches(loader_of(sampler, num_workers=workers, prefetch_factor=4 if workers else None))
    taken = take(batches, 3)
    assert sampler.state_dict() == {"consumed": 12, "size": 50, "seed": 3, "shuffle": True}
    expected = take(batches, 4)
    again = Sampler(50, 4, 3)
    again.load_state_dict({"consumed": 12, "size": 50, "seed": 3, "shuffle": True})
    assert take(again.batches(loader_of(again, num_workers=workers)), 4) == expected
    assert flat(taken) == ordered(np.arange(12), 50, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_made_before_the_restore_raises(workers):
    sampler = Sampler(50, 4, 3)
    loader = loader_of(sampler, num_workers=workers)
    counted, state = sampler.batches(loader), sampler.state_dict()
    next(counted)
    direct = iter(loader)
    next(direct)
    sampler.load_state_dict(state)
    with pytest.raises(SamplerStale, match="before the state was restored"):
        next(counted)
    with pytest.raises(SamplerStale, match="before the state was restored"):
        next(direct)
    assert take(sampler.batches(loader), 1)[0] == ordered(np.arange(4), 50, 3)


def test_an_iterator_that_is_dropped_ends_its_workers_at_once():
    sampler = Sampler(50, 4, 3)
    batches = sampler.batches(loader_of(sampler, num_workers=2))
    next(batches)
    own = set(multiprocessing.active_children())
    assert len(own) >= 2
    gc.disable()
    try:
        del batches
        assert not own & set(multiprocessing.active_children())
    finally:
        gc.enable()


def test_a_second_iterator_takes_over_and_the_first_raises():
    sampler = Sampler(50, 4, 3)
    first = sampler.batches(loader_of(sampler))
    a = next(first).tolist()
    second = sampler.batches(loader_of(sampler))
    b = next(second).tolist()
    with pytest.raises(SamplerStale, match="another iterator"):
        next(first)
    assert a + b == ordered(np.arange(8), 50, 3)


def test_a_loader_iterated_directly_counts_by_advance_and_refuses_to_guess():
    sampler = Sampler(50, 4, 3)
    batches = iter(loader_of(sampler, num_workers=2))
    next(batches)
    with pytest.raises(StateInvalid, match=r"nobody says how many .*advance"):
        sampler.state_dict()
    sampler.advance()
    next(batches)
    sampler.end_step()  # what the context does
    assert sampler.state_dict()["consumed"] == 8
    with pytest.raises(LoopMisused, match="the loader has asked for"):
        sampler.advance(1000)


def test_counting_twice_is_refused():
    sampler = Sampler(50, 4, 3)
    next(sampler.batches(loader_of(sampler)))
    with pytest.raises(LoopMisused, match="counts what is taken"):
        sampler.advance()
    sampler.end_step()
    assert sampler.consumed == 4


def test_micro_batches_count_as_one_step_and_its_middle_is_no_place_to_save():
    sampler = Sampler(50, 8, 3, rank=1, world=3)
    batches = sampler.batches(DataLoader(Numbers(50), batch_sampler=sampler.passes(2)))
    assert [len(batch) for batch in (next(batches), next(batches))] == [2, 1]
    assert sampler.state_dict()["consumed"] == 8
    next(batches)
    with pytest.raises(StateInvalid, match="1 of 2 batches"):
        sampler.state_dict()


def test_single_indices_serve_a_loader_with_a_batch_size():
    sampler = Sampler(50, 8, 3, rank=1, world=2)
    batches = sampler.batches(DataLoader(Numbers(50), sampler=sampler.samples, batch_size=2))
    assert flat(take(batches, 4)) == [i for step in (0, 8) for i in ordered(np.arange(step + 4, step + 8), 50, 3)]
    assert sampler.consumed == 16
    with pytest.raises(LoopMisused, match="does not divide"):
        sampler.batches(DataLoader(Numbers(50), sampler=sampler.samples, batch_size=3))


def test_a_loader_of_something_else_is_refused():
    with pytest.raises(LoopMisused, match="does not draw from this sampler"):
        Sampler(50, 8).batches(DataLoader(Numbers(50), batch_size=8))
    with pytest.raises(LoopMisused, match="map-style"):
        Sampler(50, 8).loader(Endless())


@pytest.mark.parametrize(
    "changed", [{"size": 51}, {"seed": 4}, {"shuffle": False}, {"consumed": -1}, {"consumed": "3"}]
)
def test_the_position_in_another_order_is_refused(changed):
    sampler = Sampler(50, 4, 3)
    with pytest.raises(StateMismatch, match=r"resilient\.Sampler"):
        sampler.load_state_dict({"consumed": 8, "size": 50, "seed": 3, "shuffle": True, **changed})


def test_another_global_batch_goes_on_with_the_next_sample():
    sampler = Sampler(50, 7, 3)
    sampler.load_state_dict({"consumed": 8, "size": 50, "seed": 3, "shuffle": True})
    assert next(iter(sampler)) == ordered(np.arange(8, 15), 50, 3)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"global_batch": 0}, {"rank": 0}, {"rank": 2, "world": 2}])
def test_sizes_and_places_that_cannot_be_are_refused(arguments):
    with pytest.raises(LoopMisused):
        Sampler(**{"size": 5, "global_batch": 2, **arguments})


def test_rank_and_world_come_from_the_launcher_when_iteration_begins(monkeypatch):
    sampler = Sampler(50, 4, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert next(iter(sampler)) == ordered(np.arange(2, 4), 50, 3)


# ---- random numbers
@pytest.mark.parametrize("workers", [0, 2])
def test_our_loader_leaves_the_trainings_random_numbers_alone(workers):
    sampler = Sampler(50, 4, 3)
    before = values.encode(rng.capture())
    batches = sampler.batches(sampler.loader(Noisy(50), num_workers=workers))
    next(batches), next(batches)
    assert values.encode(rng.capture()) == before


def test_iterating_a_bare_loader_does_draw_so_its_generator_matters():
    before = values.encode(rng.capture())
    iter(DataLoader(Numbers(4), generator=torch.Generator()))
    assert values.encode(rng.capture()) == before
    iter(DataLoader(Numbers(4)))
    assert values.encode(rng.capture()) != before


def test_augmentation_repeats_exactly_after_a_restart_with_any_number_of_workers():
    def rows(sampler, steps, workers):
        batches = sampler.batches(sampler.loader(Noisy(20), num_workers=workers))
        return [[column.tolist() for column in next(batches)] for _ in range(steps)]

    expected = rows(Sampler(20, 4, 3), 6, 0)
    sampler = Sampler(20, 4, 3)
    state = {}
    assert rows(sampler, 2, 2) == expected[:2]
    state = sampler.state_dict()
    again = Sampler(20, 4, 3)
    again.load_state_dict(state)
    assert rows(again, 4, 1) == expected[2:]
    # The second epoch draws other numbers for the same sample.
    noise = {row[0]: row[1] for batch in expected[:5] for row in zip(*batch, strict=True)}
    assert all(noise[row[0]] != row[1] for row in zip(*expected[5], strict=True))
