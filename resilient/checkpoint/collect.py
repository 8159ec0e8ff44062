"""What is gathered while live state is walked: for a save, and for a restore."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from resilient.checkpoint import values
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.tensors import Boxes, LocalTensor, dtype_name, local_tensor
from resilient.errors import StateInvalid, StateMismatch

ABSENT: Any = object()
"""What `Loading.value` gives for a value that is not there."""

_RANK_SUFFIX = re.compile(r"@(\d+)$")
NAMES_SHOWN = 8


def escape(key: object) -> str:
    """A container's key as a part of a name; the separators of names are percent-encoded."""
    return str(key).replace("%", "%25").replace("/", "%2F").replace("@", "%40")


def of_rank(name: str, own: int | None) -> str:
    """The name of a tensor that is one rank's own (`own` is its number), or everyone's."""
    return name if own is None else f"{name}@{own}"


@dataclass
class Saving:
    """Tensors and encoded values by name."""

    rank: int
    tensors: dict[str, LocalTensor] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    rank_values: dict[str, bytes] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    boxes: Boxes = field(default_factory=dict)

    def tensor(self, name: str, tensor: torch.Tensor, own: int | None) -> None:
        """Add what this rank holds of a tensor. Raises StateInvalid when the name is taken."""
        name = of_rank(name, own)
        self._claim(name)
        found = local_tensor(name, tensor, self.boxes)
        if found is not None:
            self.tensors[name] = found

    def encoded(self, name: str, data: bytes, own: int | None) -> None:
        """Add an encoded value."""
        self._claim(f"{name} (value)")
        (self.values if own is None else self.rank_values)[name] = data

    def _claim(self, name: str) -> None:
        if name in self.names:
            raise StateInvalid(
                f"two things in the state are both named {name!r}",
                where=name,
                next="rename one (keys 1 and '1' of a dict make the same name)",
            )
        self.names.add(name)


@dataclass
class Loading:
    """What is stored, and what of it the live state wants."""

    stored: Mapping[str, TensorInfo]
    stored_values: Mapping[tuple[str, int | None], bytes]
    only: Collection[str] | None
    rank: int
    same_layout: bool
    wanted: list[LocalTensor] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # name -> what the live state expected there
    noted: dict[str, str] = field(default_factory=dict)  # left out, and that is no mismatch
    used: set[str] = field(default_factory=set)
    used_values: set[str] = field(default_factory=set)
    boxes: Boxes = field(default_factory=dict)
    phases: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    _children: dict[str, dict[str, str]] | None = None
    _values_of: dict[tuple[str, int | None], dict[str, str]] | None = None

    def selects(self, name: str) -> bool:
        """Whether `only` asks for this name: by itself, as a part of something, or by a glob."""
        if self.only is None:
            return True
        return any(
            name == pattern or name.startswith(f"{pattern}/") or fnmatch.fnmatchcase(name, pattern)
            for pattern in self.only
        )

    def value(self, name: str, own: int | None = None) -> Any:
        """The decoded value, or ABSENT."""
        data = self.stored_values.get((name, own))
        if data is None:
            return ABSENT
        self.used_values.add(name)
        return values.decode(data, where=name)

    def want(self, name: str, target: torch.Tensor) -> None:
        """Read the stored tensor `name` into `target`. Raises StateMismatch for another shape or dtype."""
        info = self.stored[name]
        self.used.add(name)
        if info.shape != tuple(target.shape) or info.dtype != dtype_name(target):
            raise StateMismatch(
                f"saved as {info.dtype} {list(info.shape)}, but the live tensor is "
                f"{dtype_name(target)} {list(target.shape)}",
                where=name,
                next="build the model (and optimizer) as it was saved, or leave this name out with only=...",
            )
        found = local_tensor(name, target, self.boxes)
        if found is not None:
            self.wanted.append(found)

    def new(self, name: str) -> torch.Tensor:
        """A new tensor on the CPU that the whole stored tensor `name` is read into."""
        info = self.stored[name]
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        self.want(name, tensor)
        return tensor

    def children(self, name: str) -> dict[str, str]:
        """Stored tensors directly below `name`: last part of the name -> whole name."""
        if self._children is None:
            self._children = {}
            for full in self.stored:
                parent, _, last = full.rpartition("/")
                self._children.setdefault(parent, {})[last] = full
        return self._children.get(name, {})

    def values_below(self, name: str, own: int | None) -> dict[str, str]:
        """Stored values directly below `name`, everyone's or one rank's: last part of the name -> whole name."""
        if self._values_of is None:
            self._values_of = {}
            for full, rank in self.stored_values:
                parent, _, last = full.rpartition("/")
                self._values_of.setdefault((parent, rank), {})[last] = full
        return self._values_of.get((name, own), {})

    def later(self, phase: int, act: Callable[[], None]) -> None:
        """Do this once everything is read; lower phases first."""
        self.phases.setdefault(phase, []).append(act)

    def finish(self) -> None:
        """Apply everything that is not a tensor's content."""
        for phase in sorted(self.phases):
            for act in self.phases[phase]:
                act()

    def unexpected(self) -> list[str]:
        """Stored names that `only` asks for and the live state has no place for."""
        names = [
            name
            for name in self.stored
            if name not in self.used and self.selects(name) and not self._another_ranks(name)
        ]
        for name, rank in self.stored_values:
            if rank in (None, self.rank) and name not in self.used_values and self.selects(name):
                names.append(name)
        return sorted(set(names))

    def _another_ranks(self, name: str) -> bool:
        found = _RANK_SUFFIX.search(name)
        return found is not None and int(found[1]) != self.rank


def mismatch(missing: Mapping[str, str], unexpected: Collection[str]) -> StateMismatch:
    """The error for names without a partner."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} not in the checkpoint: {_some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} only in the checkpoint: {_some(unexpected)}")
    return StateMismatch(
        f"the live state and the checkpoint hold different things; {'; '.join(parts)}",
        next='restore a part with only="...", or take what fits with strict=False (it reports what was left out)',
    )


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:NAMES_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > NAMES_SHOWN else "")
