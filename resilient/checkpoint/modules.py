"""Modules by canonical names: parameters, buffers and extra state, without the prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from resilient.checkpoint import values
from resilient.checkpoint.collect import ABSENT, Loading, Saving, of_rank
from resilient.checkpoint.tree import join_tensors, split_tensors
from resilient.errors import StateInvalid

_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
TIED = "@tied"
"""Value below a tied parameter's further names: the name that it is stored under."""


class Trainable:
    """A module of which only what learns is saved; see `trainable`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def trainable(module: nn.Module) -> Trainable:
    """Put `trainable(model)` into `state` to save only what learns: parameters that require gradients, and the
    buffers of modules that own such a parameter (running statistics). The rest must be built the same way again.
    """
    return Trainable(module)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a module's state dict."""

    raw: str  # its key in state_dict()
    names: tuple[str, ...]  # canonical; more than one if it is tied
    tensor: torch.Tensor
    live: bool  # the parameter or buffer itself, so that it can be written in place
    is_buffer: bool


@dataclass(frozen=True, kw_only=True)
class ModuleState:
    """A module's state dict, taken apart."""

    entries: tuple[Entry, ...]
    extra: dict[str, tuple[str, object]]  # canonical name -> (raw key, value) of what is not a tensor


def take_apart(key: str, module: nn.Module) -> ModuleState:
    """Every tensor of `module.state_dict()` once, named `<key>/<canonical name>`.

    The state dict is asked for, not the parameters, so that modules' own hooks have their say; FSDP2 reshards there.
    """
    live = {id(tensor): False for tensor in module.parameters()} | {id(tensor): True for tensor in module.buffers()}
    found: dict[int, tuple[str, torch.Tensor, list[str]]] = {}
    extra: dict[str, tuple[str, object]] = {}
    for raw, value in module.state_dict(keep_vars=True).items():
        name = f"{key}/{canonical(module, raw)}"
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), (raw, value, []))[2].append(name)
        else:
            extra[name] = (raw, value)
    entries = tuple(
        Entry(raw=raw, names=tuple(names), tensor=value, live=this in live, is_buffer=live.get(this, False))
        for this, (raw, value, names) in found.items()
    )
    return ModuleState(entries=entries, extra=extra)


def canonical(root: nn.Module, name: str) -> str:
    """A state dict's key without what DDP, torch.compile and activation checkpointing put into it.

    Raises StateInvalid for the flattened parameters of FSDP1.
    """
    module: object = root
    kept = []
    for part in name.split("."):
        while (child := _wrapped(module)) is not None and part != child:
            module = getattr(module, child)  # a hook has removed the wrapper's prefix already
        if child is None:
            kept.append(part)
            if part in ("_flat_param", "_fsdp_wrapped_module"):
                raise StateInvalid(
                    "FSDP1 flattens parameters, and their names and shapes are lost",
                    where=name,
                    next="use torch.distributed.fsdp.fully_shard (FSDP2)",
                )
        module = getattr(module, part, None)
    return ".".join(kept)


def _wrapped(module: object) -> str | None:
    """The attribute under which a wrapper holds its module; None if this is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    own = getattr(module, "_modules", {})
    for child in (_COMPILED, _CHECKPOINTED):
        if child in own and len(own) == 1:
            return child
    return None


def learns(module: nn.Module) -> set[int]:
    """Ids of the tensors that `trainable` saves."""
    chosen: set[int] = set()
    for part in module.modules():
        own = [tensor for tensor in part.parameters(recurse=False) if tensor.requires_grad]
        if own:
            chosen.update(map(id, own))
            chosen.update(id(tensor) for tensor in part.buffers(recurse=False))
    return chosen


def save_module(module: nn.Module, state: ModuleState, saving: Saving, own: int | None, *, only_learning: bool) -> None:
    """Add a module's tensors and values."""
    chosen = learns(module) if only_learning else None
    elsewhere = _buffers_of_other_ranks(module)
    for entry in state.entries:
        if chosen is not None and id(entry.tensor) not in chosen:
            continue
        if id(entry.tensor) not in elsewhere:
            saving.tensor(entry.names[0], entry.tensor, own)
        for other in entry.names[1:]:
            saving.encoded(f"{other}/{TIED}", values.encode(entry.names[0]), own)
    if chosen is None:
        for name, (_, value) in state.extra.items():
            skeleton, tensors = split_tensors(value, name)
            saving.encoded(name, values.encode(skeleton, where=name), own)
            for part, tensor in tensors.items():
                saving.tensor(part, tensor, own)


def _buffers_of_other_ranks(module: nn.Module) -> set[int]:
    """Buffers that DDP overwrites with those of its rank 0 at the next forward: only rank 0's are the state."""
    return {
        id(buffer)
        for part in module.modules()
        if isinstance(part, DistributedDataParallel)
        and part.broadcast_buffers
        and dist.get_rank(part.process_group) != 0
        for buffer in part.buffers()
    }


def load_module(
    module: nn.Module, state: ModuleState, loading: Loading, own: int | None, *, only_learning: bool
) -> None:
    """Want a module's tensors; extra state and what has no memory of its own go through `load_state_dict`."""
    chosen = learns(module) if only_learning else None
    rest: dict[str, object] = {}
    for entry in state.entries:
        if chosen is not None and id(entry.tensor) not in chosen:
            _pass_over(entry, loading, own)
            continue
        names = [name for name in entry.names if loading.selects(name)]
        if not names:
            continue
        source = next(_sources(names, loading, own), None)
        if source is None:
            loading.missing.update(dict.fromkeys(names[:1], "a parameter or buffer"))
            continue
        _mark(names, loading, own)
        target = entry.tensor if entry.live else torch.empty_like(entry.tensor)
        if not entry.live:
            rest[entry.raw] = target
        loading.want(source, target)
    for name, (raw, _) in state.extra.items():
        if chosen is None and loading.selects(name):
            _load_extra(name, raw, loading, own, rest)
    if rest:
        loading.later(3, lambda: _into(module, rest))


def _into(module: nn.Module, rest: dict[str, object]) -> None:
    module.load_state_dict(rest, strict=False)


def _pass_over(entry: Entry, loading: Loading, own: int | None) -> None:
    """A whole model's checkpoint holds more than what learns: no surprise."""
    _mark(entry.names, loading, own)
    loading.used.update(_sources(entry.names, loading, own))


def _sources(names: Iterable[str], loading: Loading, own: int | None) -> Iterator[str]:
    """Stored tensors that hold this parameter, by any of its names."""
    for name in names:
        found = of_rank(resolve(name, loading, own), own)
        if found in loading.stored:
            yield found


def resolve(name: str, loading: Loading, own: int | None) -> str:
    """The name that a parameter was saved under: its own, or the one that it was tied to."""
    if of_rank(name, own) in loading.stored:
        return name
    other = loading.value(f"{name}/{TIED}", own)
    return other if isinstance(other, str) else name


def _mark(names: Iterable[str], loading: Loading, own: int | None) -> None:
    loading.used.update(of_rank(name, own) for name in names)
    loading.used_values.update(f"{name}/{TIED}" for name in names)


def _load_extra(name: str, raw: str, loading: Loading, own: int | None, rest: dict[str, object]) -> None:
    skeleton = loading.value(name, own)
    if skeleton is ABSENT:
        loading.missing[name] = "extra state"
        return
    rest[raw] = join_tensors(skeleton, ABSENT, loading, own)
