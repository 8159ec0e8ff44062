"""Boxes: overlaps, cuts and gaps, each compared with what NumPy's masks say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.checkpoint.geometry import Box, c_range, covers, missing, split, whole
from resilient.errors import ShardInvalid

SIDE = 12


def boxes(dims):
    axis = st.tuples(st.integers(0, 6), st.integers(0, 5))
    axes = st.lists(axis, min_size=dims, max_size=dims)
    return axes.map(lambda axes: Box(*zip(*axes, strict=True)) if axes else SCALAR)


SCALAR = Box((), ())
same_dims = st.integers(0, 3).flatmap(lambda dims: st.lists(boxes(dims), min_size=2, max_size=8))
any_box = st.integers(0, 3).flatmap(boxes)


def mask(box):
    array = np.zeros([SIDE] * len(box.shape), bool)
    array[box.slices()] = True
    return array


def numbered(box):
    """An array in which the box's elements have their C-order numbers."""
    array = np.full([SIDE] * len(box.shape), -1)
    array[box.slices()] = np.arange(box.size).reshape(box.shape)
    return array


@given(same_dims)
def test_an_overlap_is_the_elements_in_both(pair):
    a, b = pair[:2]
    both = mask(a) & mask(b)
    shared = a.overlap(b)
    assert (shared is None) == (not both.any())
    if shared is not None:
        assert (mask(shared) == both).all()
        assert (numbered(a)[a.slices()][shared.relative_to(a).slices()] == numbered(a)[shared.slices()]).all()


@given(any_box, st.integers(1, 40))
def test_pieces_follow_one_another_in_the_boxs_own_order(box, most):
    array, at = numbered(box), 0
    for piece in split(box, most):
        assert 0 < piece.size <= most
        assert array[piece.slices()].ravel().tolist() == list(range(at, at + piece.size))
        at += piece.size
    assert at == box.size


def test_pieces_are_not_smaller_than_they_must_be():
    assert [piece.shape for piece in split(whole((10, 100)), 400)] == [(3, 100), (3, 100), (4, 100)]
    assert len(split(whole((3, 1000)), 400)) == 9
    assert split(whole((4096, 1024)), 1 << 20) == tuple(Box((i * 1024, 0), (1024, 1024)) for i in range(4))


@given(any_box, st.data())
def test_a_range_of_elements_is_at_most_2d_minus_1_boxes(box, data):
    low = data.draw(st.integers(0, box.size))
    high = data.draw(st.integers(low, box.size))
    array, at = numbered(box), low
    pieces = c_range(box, low, high)
    for piece in pieces:
        assert array[piece.slices()].ravel().tolist() == list(range(at, at + piece.size))
        at += piece.size
    assert at == high
    assert len(pieces) <= max(1, 2 * len(box.shape) - 1)


@given(same_dims)
def test_what_is_missing_is_in_no_box_and_listed_once(some):
    of, *others = some
    expected = mask(of)
    for box in others:
        expected &= ~mask(box)
    times = np.zeros_like(expected, int)
    for gap in missing(others, of):
        assert gap.size
        times[gap.slices()] += 1
    assert (times == expected).all()


def test_a_partition_covers_until_one_box_is_taken_away():
    boxes_of_a_grid = [Box((i, j), (2, 3)) for i in range(0, 8, 2) for j in range(0, 9, 3)]
    assert covers(boxes_of_a_grid, (8, 9))
    assert missing(boxes_of_a_grid[:5] + boxes_of_a_grid[6:], whole((8, 9))) == (boxes_of_a_grid[5],)


def test_scalars_and_empty_tensors_are_boxes_too():
    assert SCALAR.size == 1
    assert split(SCALAR, 1) == (SCALAR,)
    assert SCALAR.overlap(SCALAR) == SCALAR
    assert not covers([], ())
    assert covers([SCALAR], ())
    assert covers([], (0, 4))
    assert split(Box((3, 0), (0, 4)), 2) == ()


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: Box((0,), (1, 2)),
        lambda: Box((-1,), (1,)),
        lambda: Box((0,), (-1,)),
        lambda: Box((0,), (1,)).overlap(SCALAR),
        lambda: Box((0,), (3,)).relative_to(Box((1,), (3,))),
        lambda: split(whole((4,)), 0),
        lambda: c_range(whole((4,)), 3, 5),
    ],
)
def test_impossible_boxes_and_cuts_are_refused(impossible):
    with pytest.raises(ShardInvalid):
        impossible()
