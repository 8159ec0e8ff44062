"""Optimizers by their parameters' names: state tensors made directly, options of each parameter's group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from resilient.checkpoint import values
from resilient.checkpoint.collect import ABSENT, Loading, Saving, of_rank
from resilient.checkpoint.modules import resolve
from resilient.checkpoint.tensors import dtype_name
from resilient.checkpoint.tree import join_tensors, pour, split_tensors
from resilient.errors import CheckpointDamaged, StateInvalid, StateMismatch

Names = Mapping[int, tuple[str, ...]]
"""id of a parameter -> its full names in the state ("model/layers.0.weight"); more than one if it is tied."""

OPTIONS = "@options"
KIND = "@class"
_NOT_STATE = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})
"""What a group holds beside options: its parameters, and how (not what) the running program computes."""
_ON_HOST = frozenset({"step", "mu_product", "eta", "mu"})
"""Scalars that torch keeps on the CPU unless the implementation needs them on the device."""
_OPTION_ELEMENTS_MAX = 64


def save_optimizer(key: str, optimizer: torch.optim.Optimizer, names: Names, saving: Saving, own: int | None) -> None:
    """Add `<key>/<parameter>/<slot>` for each state tensor, and `<key>/<parameter>/@options`.

    Raises StateInvalid for a parameter that nothing in the state holds, and for optimizers that hide their state.
    """
    _check_kind(key, optimizer)
    saving.encoded(f"{key}/{KIND}", values.encode(type(optimizer).__qualname__), own)
    for number, group in enumerate(optimizer.param_groups):
        where = f"{key}.param_groups[{number}]"
        options = {name: _plain(value, where) for name, value in group.items() if name not in _NOT_STATE}
        encoded = values.encode(options, where=where)
        for parameter in group["params"]:
            name = f"{key}/{_name_of(parameter, names, key, number)[0]}"
            saving.encoded(f"{name}/{OPTIONS}", encoded, own)
            for slot, value in optimizer.state.get(parameter, {}).items():  # [...] would make an entry
                _save_slot(f"{name}/{slot}", value, parameter, saving, own)


def _save_slot(name: str, value: object, parameter: torch.Tensor, saving: Saving, own: int | None) -> None:
    if isinstance(value, torch.Tensor):
        if _follows_its_parameter(value, parameter):
            saving.tensor(name, value, own)
            return
        local = value.to_local() if isinstance(value, DTensor) else value
        saving.tensor(name, local, saving.rank)
        saving.encoded(name, values.encode(_placement(value)), saving.rank)
        return
    skeleton, tensors = split_tensors(value, name)
    saving.encoded(name, values.encode(skeleton, where=name), own)
    for part, tensor in tensors.items():
        saving.tensor(part, tensor, own)


def _follows_its_parameter(value: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether the value can be resharded: it is whole everywhere, or cut as its parameter is."""
    if not isinstance(parameter, DTensor):
        return not isinstance(value, DTensor)
    if isinstance(value, DTensor):
        return value.shape == parameter.shape
    return value.dim() == 0


def _placement(value: torch.Tensor) -> dict[str, object]:
    """How a state tensor of another shape than its parameter was laid out: to be found the same again."""
    if isinstance(value, DTensor):
        placements = [repr(placement) for placement in value.placements]
        return {"placements": placements, "shape": list(value.shape), "stride": list(value.stride())}
    return {"placements": None, "shape": list(value.shape), "stride": []}


def _name_of(parameter: torch.Tensor, names: Names, key: str, group: int) -> tuple[str, ...]:
    found = names.get(id(parameter))
    if found is None:
        raise StateInvalid(
            f"a parameter of shape {list(parameter.shape)} in group {group} belongs to no module in the state, "
            "so it has no name",
            where=key,
            next='put the module beside the optimizer: state={"model": model, "optimizer": optimizer}; make the '
            "optimizer after fully_shard(model), which replaces the parameters",
        )
    return found


def _check_kind(key: str, optimizer: torch.optim.Optimizer) -> None:
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        raise StateInvalid(
            "ZeroRedundancyOptimizer keeps each parameter's state on one rank only",
            where=key,
            next="shard with torch.distributed.fsdp.fully_shard (FSDP2) instead",
        )


def _plain(value: Any, where: str) -> Any:
    """An option as a plain value; a tensor (a learning rate, as a rule) as a NumPy scalar or array."""
    if isinstance(value, torch.Tensor):
        if value.numel() > _OPTION_ELEMENTS_MAX or isinstance(value, DTensor) or value.dtype == torch.bfloat16:
            raise StateInvalid(f"an option is a {value.dtype} tensor of {value.numel()} elements", where=where)
        array = value.detach().cpu().numpy()
        return array[()] if array.ndim == 0 else array.copy()
    if type(value) in (tuple, list):
        return type(value)(_plain(item, where) for item in value)
    return value


# ---- back
def load_optimizer(key: str, optimizer: torch.optim.Optimizer, names: Names, loading: Loading, own: int | None) -> None:
    """Want every stored state tensor of the live parameters, into tensors that are there or are made here.

    Nothing is attached before everything is read. A parameter that had no state when saved has none afterwards.
    """
    _check_kind(key, optimizer)
    _check_class(key, optimizer, loading, own)
    states: dict[torch.Tensor, dict[str, Any]] = {}
    for number, group in enumerate(optimizer.param_groups):
        options: list[tuple[str, dict[str, Any]]] = []
        for parameter in group["params"]:
            found = _stored_name(key, _name_of(parameter, names, key, number), loading, own)
            if found is None:
                continue
            options.append((found, _options(found, loading, own)))
            states[parameter] = _load_state(found, optimizer, parameter, group, loading, own)
        if options:
            _load_options(f"{key}.param_groups[{number}]", group, options, loading)

    def attach() -> None:
        for parameter, slots in states.items():
            if slots:
                optimizer.state[parameter] = slots
            else:
                optimizer.state.pop(parameter, None)

    loading.later(0, attach)


def _check_class(key: str, optimizer: torch.optim.Optimizer, loading: Loading, own: int | None) -> None:
    """Another class would find no state of its own, or another's: steps would fail later, or silently differ."""
    saved, live = loading.value(f"{key}/{KIND}", own), type(optimizer).__qualname__
    if saved is not ABSENT and saved != live and any(loading.selects(f"{key}/{part}") for part in (KIND, OPTIONS)):
        raise StateMismatch(
            f"saved by {saved}, but the live optimizer is {live}",
            where=key,
            next='use the optimizer it was saved by, or leave it out with only="model"',
        )


def _stored_name(key: str, names: tuple[str, ...], loading: Loading, own: int | None) -> str | None:
    """`<key>/<parameter>` as it was stored, by any name of a tied parameter; marks the others as used."""
    wanted = [name for name in names if loading.selects(f"{key}/{name}/{OPTIONS}") or loading.selects(f"{key}/{name}")]
    if not wanted:
        return None
    candidates = [*wanted, *(resolve(name, loading, own) for name in wanted)]
    found = [f"{key}/{name}" for name in candidates if (f"{key}/{name}/{OPTIONS}", own) in loading.stored_values]
    if not found:
        loading.missing[f"{key}/{wanted[0]}"] = "state of a parameter"
        return None
    for other in found[1:]:
        loading.used.update(loading.children(other).values())
        loading.used_values.update(loading.values_below(other, own).values())
    return found[0]


def _options(name: str, loading: Loading, own: int | None) -> dict[str, Any]:
    options = loading.value(f"{name}/{OPTIONS}", own)
    if not isinstance(options, dict):
        raise CheckpointDamaged("the options of a parameter are not a dict", where=name)
    return options


def _load_options(
    where: str, group: dict[str, Any], stored: list[tuple[str, dict[str, Any]]], loading: Loading
) -> None:
    first_name, first = stored[0]
    encoded = values.encode(first)
    for name, options in stored[1:]:
        if values.digest(values.encode(options)) != values.digest(encoded):
            differing = sorted(k for k in {*options, *first} if options.get(k) != first.get(k))
            raise StateMismatch(
                f"{name} and {first_name} are in one group, but were saved with different options: {differing}",
                where=where,
                next="group the parameters as they were when saved",
            )

    def put() -> None:
        for name, value in first.items():
            if name not in _NOT_STATE:
                group[name] = _revived(group.get(name, ABSENT), value)

    loading.later(3, put)


def _revived(live: Any, value: Any) -> Any:
    """The stored option in the form of the live one: a tensor is filled, as graphs may hold on to it."""
    if isinstance(live, torch.Tensor):
        with torch.no_grad():
            live.copy_(torch.as_tensor(value))
        return live
    if isinstance(live, float) and hasattr(value, "item"):
        return value.item()
    return pour(live, value, lambda _: False)


def _load_state(
    name: str,
    optimizer: torch.optim.Optimizer,
    parameter: torch.Tensor,
    group: dict[str, Any],
    loading: Loading,
    own: int | None,
) -> dict[str, Any]:
    live = optimizer.state.get(parameter, {})
    slots: dict[str, Any] = {}
    for last, stored in loading.children(name).items():
        slot, at, _ = last.rpartition("@")
        if not at:
            slots[last] = _target(stored, last, live.get(last), parameter, group, loading)
        elif last == of_rank(slot, own):
            slots[slot] = _target(stored, slot, live.get(slot), parameter, group, loading)
        elif own is None and slot not in slots:
            slots[slot] = _load_laid_out(f"{name}/{slot}", parameter, loading)
    for last, stored in loading.values_below(name, own).items():
        if last not in slots and not last.startswith("@"):
            slots[last] = join_tensors(loading.value(stored, own), live.get(last, ABSENT), loading, own)
    return slots


def _target(
    stored: str, slot: str, live: object, parameter: torch.Tensor, group: dict[str, Any], loading: Loading
) -> torch.Tensor:
    """The tensor that a slot is read into: the live one if it fits, else a new one where torch would make it."""
    info = loading.stored[stored]
    dtype, shape = getattr(torch, info.dtype), info.shape
    if not (isinstance(live, torch.Tensor) and tuple(live.shape) == shape and dtype_name(live) == info.dtype):
        on_device = group.get("fused") or group.get("capturable")
        if shape == () and (slot in _ON_HOST or parameter.dim() > 0):
            live = torch.empty((), dtype=dtype, device=parameter.device if on_device else "cpu")
        elif shape == tuple(parameter.shape):
            live = torch.empty_like(parameter, dtype=dtype, requires_grad=False).detach()
        elif isinstance(parameter, DTensor):
            raise StateMismatch(
                f"state of shape {list(shape)} does not follow its parameter of shape {list(parameter.shape)}, "
                "so it cannot be resharded",
                where=stored,
                next='restore in the layout that it was saved in, or leave the optimizer out with only="model"',
            )
        else:
            live = torch.empty(shape, dtype=dtype, device=parameter.device)
    loading.want(stored, live)
    return live


def _load_laid_out(name: str, parameter: torch.Tensor, loading: Loading) -> torch.Tensor:
    """A state tensor of another shape than its parameter: as this very rank saved it, in the same layout only."""
    own = loading.rank
    laid_out, stored = loading.value(name, own), of_rank(name, own)
    if (
        not loading.same_layout
        or laid_out is ABSENT
        or stored not in loading.stored
        or not isinstance(parameter, DTensor)
    ):
        raise StateMismatch(
            "this state does not have its parameter's shape (factored or packed), so it cannot be resharded",
            where=name,
            next='restore in the layout that it was saved in, or leave the optimizer out with only="model"',
        )
    info = loading.stored[stored]
    local = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device=parameter.device)
    loading.want(stored, local)
    if laid_out["placements"] is None:
        return local
    known = {repr(placement): placement for placement in parameter.placements}
    known[repr(Replicate())] = Replicate()
    if any(placement not in known for placement in laid_out["placements"]):
        raise StateMismatch(f"placements {laid_out['placements']} are none of its parameter's", where=name)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        [known[placement] for placement in laid_out["placements"]],
        run_check=False,
        shape=torch.Size(laid_out["shape"]),
        stride=tuple(laid_out["stride"]),
    )
