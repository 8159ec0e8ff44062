"""The layout: how many ranks stand along each axis of the mesh (pure)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from runtime.config import LayoutConfig
from runtime.errors import LayoutInvalid

AXES = ("pipeline", "replicate", "shard", "expert", "context", "tensor")
"""Outermost first: the axis that talks most comes last, where neighbouring ranks share the fastest link."""

_CARRIED_OUT = ("replicate", "shard")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes; a value that cannot be carried out cannot exist."""

    replicate: int = 1  # copies of the model
    shard: int = 1  # ranks that share one copy
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size < 1:
                raise LayoutInvalid(f"{axis} is {size}, expected at least 1")
            if size > 1 and axis not in _CARRIED_OUT:
                raise LayoutInvalid(
                    f"{axis} is {size}, but this version carries out {' and '.join(_CARRIED_OUT)} only",
                    next=f"set layout.{axis}=1",
                )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes().values())

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    def sizes(self) -> dict[str, int]:
        """Size by axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def __str__(self) -> str:
        used = [f"{axis} {size}" for axis, size in self.sizes().items() if size > 1]
        return " x ".join(used) or "one rank"


def fit_layout(wanted: LayoutConfig, world_size: int) -> Layout:
    """The layout that `wanted` means on `world_size` ranks; one axis may be 0, "whatever ranks are left".

    Raises LayoutInvalid, with the arithmetic.
    """
    sizes = dataclasses.asdict(wanted)
    negative = [axis for axis in AXES if sizes[axis] < 0]
    if negative:
        raise LayoutInvalid(f"layout.{negative[0]} is {sizes[negative[0]]}, expected 0 (the rest) or more")
    free = [axis for axis in AXES if sizes[axis] == 0]
    fixed = {axis: sizes[axis] for axis in AXES if sizes[axis] > 0}
    product = math.prod(fixed.values())
    shown = " x ".join(f"{axis} {size}" for axis, size in fixed.items() if size > 1 or axis in _CARRIED_OUT)
    if len(free) > 1:
        raise LayoutInvalid(f"layout.{free[0]} and layout.{free[1]} are both 0; only one axis can take the rest")
    if free:
        if world_size % product:
            raise LayoutInvalid(
                f"{shown} = {product} does not divide {world_size} ranks, so no whole number is left for {free[0]}",
                next=f"start a multiple of {product} ranks, or change the layout",
            )
        sizes[free[0]] = world_size // product
    elif product != world_size:
        raise LayoutInvalid(
            f"{shown} = {product} ranks, but the world has {world_size}",
            next=f"start {product} ranks, or set one axis to 0 so that it takes the rest",
        )
    return Layout(**sizes)
