"""Layouts against worlds."""

from __future__ import annotations

import pytest

from runtime.config import LayoutConfig
from runtime.errors import LayoutInvalid
from runtime.layout import Layout, fit_layout


@pytest.mark.parametrize(
    ("wanted", "ranks", "expected"),
    [
        (LayoutConfig(), 1, Layout()),
        (LayoutConfig(), 4, Layout(shard=4)),
        (LayoutConfig(replicate=2), 4, Layout(replicate=2, shard=2)),
        (LayoutConfig(replicate=0, shard=2), 6, Layout(replicate=3, shard=2)),
        (LayoutConfig(replicate=4, shard=1), 4, Layout(replicate=4)),
    ],
)
def test_an_axis_of_zero_takes_the_ranks_that_are_left(wanted: LayoutConfig, ranks: int, expected: Layout) -> None:
    assert fit_layout(wanted, ranks) == expected
    assert expected.world_size == ranks


@pytest.mark.parametrize(
    ("wanted", "ranks", "message"),
    [
        (LayoutConfig(replicate=2, shard=2), 3, "replicate 2 x shard 2 = 4 ranks, but the world has 3"),
        (LayoutConfig(replicate=2), 3, "replicate 2 = 2 does not divide 3 ranks"),
        (LayoutConfig(replicate=0), 3, "layout.replicate and layout.shard are both 0"),
        (LayoutConfig(replicate=-1), 3, "layout.replicate is -1"),
        (LayoutConfig(shard=1, tensor=2), 2, "tensor is 2, but this version"),
    ],
)
def test_a_layout_that_does_not_fit_shows_the_arithmetic(wanted: LayoutConfig, ranks: int, message: str) -> None:
    with pytest.raises(LayoutInvalid) as caught:
        fit_layout(wanted, ranks)
    assert message in str(caught.value)
