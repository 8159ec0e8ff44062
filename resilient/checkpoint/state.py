"""State as items: what the user handed in, flattened by name, and put back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from resilient.checkpoint import modules, optimizer, tree
from resilient.checkpoint.collect import Loading, Saving, escape, mismatch
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.modules import ModuleState, Trainable, trainable
from resilient.checkpoint.tensors import LocalTensor, Outputs, as_outputs
from resilient.errors import StateInvalid, StateMismatch

__all__ = [
    "Flat", "LocalTensor", "Outputs", "PerRank", "Restoration", "Trainable", "as_outputs", "flatten", "prepare",
    "trainable",
]  # fmt: skip


class PerRank:
    """Marks a part of the state that is each rank's own, so ranks need not agree on it: `PerRank(loader)`.

    Rank r gets back what rank r saved, in any layout. A rank that did not exist then keeps what it has, and the
    report of the restore says so.
    """

    def __init__(self, value: object) -> None:
        self.value = value


@dataclass(frozen=True, kw_only=True)
class Flat:
    """The state of one rank at one moment, by name. The tensors are live: they change when training goes on."""

    tensors: tuple[LocalTensor, ...]
    values: dict[str, bytes]  # encoded; must be equal on every rank that has them
    rank_values: dict[str, bytes]  # encoded; this rank's own


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What has to be read, and what to do once it is."""

    wanted: tuple[LocalTensor, ...]
    finish: Callable[[], None]  # applies values and attaches optimizer state; call it when all tensors are read
    left_out: tuple[str, ...]  # names without a partner (strict=False) or without a value of this rank, each said why


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One thing in the state that has entries of its own."""

    name: str
    value: object
    own: int | None  # the rank whose own it is


def flatten(state: Mapping[str, object]) -> Flat:
    """Every tensor and value of `state` under its canonical name.

    `<key>/<fqn>` for modules, `<key>/<parameter>/<slot>` for optimizers, `<key>/<path>` in containers and objects.
    Raises StateInvalid naming the path of what cannot be saved, DtypeUnknown.
    """
    rank = _rank()
    parts = list(_parts(state, rank))
    taken, names = _taken_apart(parts)
    saving = Saving(rank=rank)
    for part in parts:
        name, value, own = part.name, part.value, part.own
        if isinstance(value, Trainable):
            modules.save_module(value.module, taken[name], saving, own, only_learning=True)
        elif isinstance(value, nn.Module):
            modules.save_module(value, taken[name], saving, own, only_learning=False)
        elif isinstance(value, torch.optim.Optimizer):
            optimizer.save_optimizer(name, value, names, saving, own)
        elif (stateful := _stateful(value)) is not None:
            tree.save_object(name, stateful, saving, own)
        else:
            tree.save_tree(name, value, saving, own, _held)
    return Flat(tensors=tuple(saving.tensors.values()), values=saving.values, rank_values=saving.rank_values)


def prepare(
    state: Mapping[str, object],
    stored: Mapping[str, TensorInfo],
    values: Mapping[tuple[str, int | None], bytes],
    *,
    only: str | Collection[str] | None = None,
    strict: bool = True,
    rank: int = 0,
    same_layout: bool = True,
) -> Restoration:
    """Match the live state with what is stored. Touches nothing: tensors change when read, the rest in `finish`.

    `only` takes names, prefixes up to a `/`, or globs. Raises StateMismatch for tensors of another shape or dtype,
    and (strict) for names that only one side has; StateInvalid; CheckpointDamaged.
    """
    patterns = [only] if isinstance(only, str) else only
    loading = Loading(stored=stored, stored_values=values, only=patterns, rank=rank, same_layout=same_layout)
    _check_patterns(loading)
    parts = list(_parts(state, rank))
    taken, names = _taken_apart(parts)
    for part in parts:
        name, value, own = part.name, part.value, part.own
        if isinstance(value, Trainable):
            modules.load_module(value.module, taken[name], loading, own, only_learning=True)
        elif isinstance(value, nn.Module):
            modules.load_module(value, taken[name], loading, own, only_learning=False)
        elif isinstance(value, torch.optim.Optimizer):
            optimizer.load_optimizer(name, value, names, loading, own)
        elif (stateful := _stateful(value)) is not None:
            tree.load_object(name, stateful, loading, own)
        else:
            tree.load_tree(name, value, loading, own, _held)
    unexpected = loading.unexpected()
    if strict and (loading.missing or unexpected):
        raise mismatch(loading.missing, unexpected)
    left_out = [f"{name}: not in the checkpoint ({what})" for name, what in sorted(loading.missing.items())]
    left_out += [f"{name}: only in the checkpoint" for name in unexpected]
    left_out += [f"{name}: {why}" for name, why in sorted(loading.noted.items())]
    return Restoration(wanted=tuple(loading.wanted), finish=loading.finish, left_out=tuple(left_out))


def _check_patterns(loading: Loading) -> None:
    """A pattern that selects nothing is a typing error, and restoring nothing would hide it."""
    for pattern in loading.only or ():
        one = Loading(stored={}, stored_values={}, only=[pattern], rank=0, same_layout=False)
        if not any(one.selects(name) for name in (*loading.stored, *(name for name, _ in loading.stored_values))):
            keys = sorted({name.partition("/")[0] for name in loading.stored if not name.startswith("@")})
            raise StateMismatch(
                f"only={pattern!r} selects nothing of this checkpoint",
                next=f"its keys are {', '.join(keys)}; a glob matches whole names, as in 'model/layers.0.*'",
            )


# ---- walking
def _parts(state: Mapping[str, object], rank: int) -> Iterator[_Part]:
    given: object = state
    if not isinstance(given, Mapping):
        raise StateInvalid(
            f"the state is a {type(given).__name__}, not a dict",
            next='pass state={"model": model, "optimizer": optimizer}',
        )
    for key, value in given.items():
        if not isinstance(key, str) or not key or key.startswith("@"):
            raise StateInvalid(
                f"{key!r} is not a key of the state: keys are strings that do not begin with '@'",
                next='pass state={"model": model, ...}',
            )
        name = escape(key)
        if isinstance(value, PerRank):
            yield from _part(name, value.value, rank)
        else:
            yield from _part(name, value, None)


def _part(name: str, value: object, own: int | None) -> Iterator[_Part]:
    """The value itself, and what it holds that has entries of its own."""
    if _held(value):
        if isinstance(value, PerRank):
            raise StateInvalid("PerRank marks a whole entry of the state", where=name, next="put it at the top level")
        yield _Part(name=name, value=value, own=own)
        return
    if not _in_place(value):
        raise _refusal(name, value)
    yield _Part(name=name, value=value, own=own)
    yield from _inside(name, value, own, 0)


def _inside(name: str, value: object, own: int | None, depth: int) -> Iterator[_Part]:
    for key, item in tree.children(value) if depth < 64 else ():
        inner = f"{name}/{escape(key)}"
        if _held(item):
            yield from _part(inner, item, own)
        else:
            yield from _inside(inner, item, own, depth + 1)


def _held(value: object) -> bool:
    """Whether the value has entries of its own, so that a container only says where it is."""
    if isinstance(value, Trainable | PerRank | nn.Module | torch.optim.Optimizer):
        return True
    return _stateful(value) is not None


def _stateful(value: object) -> tree.Stateful | None:
    return None if _in_place(value) else tree.stateful(value)


def _in_place(value: object) -> bool:
    """Whether the value is a tensor or a container whose content can be replaced."""
    return isinstance(value, torch.Tensor) or type(value) in tree.IN_PLACE


def _refusal(name: str, value: object) -> StateInvalid:
    kind = type(value).__name__
    if isinstance(value, DataLoader):
        return StateInvalid(
            "a DataLoader does not know what was consumed",
            where=name,
            next="put its resilient.Sampler into the state, or use torchdata's StatefulDataLoader",
        )
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | tuple | frozenset):
        return StateInvalid(
            f"a bare {kind} cannot be restored in place",
            where=name,
            next=f'put it in a dict that your loop reads and changes: state={{"{name}": {{"value": {value!r:.40}}}}}',
        )
    return StateInvalid(
        f"a {type(value).__module__}.{kind} has no state_dict and load_state_dict",
        where=name,
        next="give it both, or put its values into a dict",
    )


def _taken_apart(parts: Sequence[_Part]) -> tuple[dict[str, ModuleState], dict[int, tuple[str, ...]]]:
    """The modules by part, and the names of every tensor by its id; the first part that holds one names it."""
    taken: dict[str, ModuleState] = {}
    names: dict[int, tuple[str, ...]] = {}
    for part in parts:
        value = part.value.module if isinstance(part.value, Trainable) else part.value
        if isinstance(value, nn.Module):
            taken[part.name] = modules.take_apart(part.name, value)
            for entry in taken[part.name].entries:
                names.setdefault(id(entry.tensor), entry.names)
        elif not isinstance(value, torch.optim.Optimizer) and _stateful(value) is None:
            for name, tensor in tree.split_tensors(value, part.name, _held)[1].items():
                names.setdefault(id(tensor), (name,))
    return taken, names


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
