"""Containers and stateful objects: plain values as one skeleton, the tensors in them apart, and both put back."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from resilient.checkpoint import values
from resilient.checkpoint.collect import ABSENT, Loading, Saving, escape, of_rank
from resilient.checkpoint.values import HeldRef, TensorRef
from resilient.errors import CheckpointDamaged, StateInvalid, StateMismatch

DICTS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, tuple, deque)
IN_PLACE = (*DICTS, list, deque, set, bytearray, np.ndarray)
"""Containers that can be restored without another object taking their place."""


@runtime_checkable
class Stateful(Protocol):
    """Anything that can say what it is and become it again."""

    def state_dict(self) -> Any:
        """What it is, as containers, plain values and tensors."""

    def load_state_dict(self, state_dict: Any, /) -> object:
        """Become what `state_dict` of another said."""


@dataclass(frozen=True)
class _Adapted:
    """A random number generator as a Stateful."""

    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], object]


def stateful(value: object) -> Stateful | None:
    """The value, or an adapter for it, if it has state of its own beside that of containers."""
    if isinstance(value, type):
        return None
    if isinstance(value, torch.Generator):
        return _Adapted(value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return _Adapted(value.getstate, value.setstate)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return _Adapted(lambda: bits.state, lambda state: setattr(bits, "state", state))
    return value if isinstance(value, Stateful) else None


# ---- taking apart
def children(value: object) -> Iterator[tuple[object, object]]:
    """(key or index, item) of a container that tensors are looked for in; nothing for anything else."""
    if type(value) in DICTS:
        yield from value.items()  # type: ignore[attr-defined]
    elif type(value) in SEQUENCES:
        yield from enumerate(value)  # type: ignore[arg-type]


def split_tensors(
    value: object, name: str, held: Callable[[object], bool] = lambda _: False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The value with a TensorRef for each tensor (a HeldRef for each held object), and the tensors by name.

    Raises StateInvalid for two tensors of one name, and for a container that contains itself.
    """
    tensors: dict[str, torch.Tensor] = {}

    def go(value: object, name: str, depth: int) -> object:
        if depth > values.MAX_DEPTH:
            raise StateInvalid(f"nested more than {values.MAX_DEPTH} deep; does it contain itself?", where=name)
        if isinstance(value, torch.Tensor):
            if name in tensors:
                raise StateInvalid("two tensors have this name", where=name, next="use keys that differ as text too")
            tensors[name] = value
            return TensorRef(name)
        if held(value):
            return HeldRef(name)
        items = [(key, go(item, f"{name}/{escape(key)}", depth + 1)) for key, item in children(value)]
        return _rebuilt(value, items) if items else value

    return go(value, name, 0), tensors


def _rebuilt(like: Any, items: list[tuple[Any, Any]]) -> Any:
    """A container of the same type with other items."""
    kind: Any = type(like)
    if kind is defaultdict:
        return defaultdict(like.default_factory, dict(items))
    if kind in DICTS:
        return kind(dict(items))
    parts = [item for _, item in items]
    return deque(parts, maxlen=like.maxlen) if kind is deque else kind(parts)


def references(skeleton: object) -> Iterator[TensorRef | HeldRef]:
    """All references in a skeleton."""
    if isinstance(skeleton, TensorRef | HeldRef):
        yield skeleton
    for _, item in children(skeleton):
        yield from references(item)


# ---- putting together
def join_tensors(skeleton: object, live: object, loading: Loading, own: int | None, *, in_place: bool = False) -> Any:
    """The skeleton with tensors that are going to be read into.

    Where `live` (ABSENT, or a tree of the same form) has a tensor, it is that one (`in_place`) or a new one like it;
    elsewhere a new one on the CPU. A held object stays. Raises CheckpointDamaged for a reference to nothing.
    """
    if isinstance(skeleton, TensorRef):
        name = of_rank(skeleton.name, own)
        if name not in loading.stored:
            raise CheckpointDamaged("a value refers to this tensor, and it is not in the checkpoint", where=name)
        if not isinstance(live, torch.Tensor):
            return loading.new(name)
        target = live if in_place else torch.empty_like(live, requires_grad=False)
        loading.want(name, target)
        return target
    if isinstance(skeleton, HeldRef):
        return live
    items = []
    for key, item in children(skeleton):
        joined = join_tensors(item, _child(live, key, type(skeleton)), loading, own, in_place=in_place)
        if joined is not ABSENT:
            items.append((key, joined))
    return _rebuilt(skeleton, items) if type(skeleton) in (*DICTS, *SEQUENCES) else skeleton


def _child(live: Any, key: Any, kind: Any) -> Any:
    if type(live) is not kind:
        return ABSENT
    if kind in DICTS:
        return live.get(key, ABSENT)
    return live[key] if key < len(live) else ABSENT


def pour(live: Any, new: Any, stays: Callable[[object], bool]) -> Any:
    """Put the content of `new` into `live`, container by container, keeping each that is there; returns the result.

    What the checkpoint does not have goes, but for items that `stays` keeps (tensors, objects).
    """
    if type(live) is not type(new) or live is new:
        return new
    kind = type(live)
    if kind in DICTS:
        items = {key: pour(live.get(key, ABSENT), item, stays) for key, item in new.items()}
        items.update({key: item for key, item in live.items() if key not in items and stays(item)})
        live.clear()
        live.update(items)
        if kind is defaultdict:
            live.default_factory = new.default_factory
        return live
    if kind in (list, tuple, deque):
        parts = [pour(live[i] if i < len(live) else ABSENT, item, stays) for i, item in enumerate(new)]
        parts += [item for item in list(live)[len(new) :] if stays(item)]
        if kind is tuple or (kind is deque and live.maxlen != new.maxlen):
            return _rebuilt(new, list(enumerate(parts)))
        live.clear()
        live.extend(parts)
        return live
    return _pour_leaf(live, new)


def _pour_leaf(live: Any, new: Any) -> Any:
    if isinstance(live, set):
        live.clear()
        live.update(new)
        return live
    if isinstance(live, bytearray):
        live[:] = new
        return live
    if isinstance(live, np.ndarray) and live.shape == new.shape and live.dtype == new.dtype and live.flags.writeable:
        np.copyto(live, new)
        return live
    return new


# ---- entries of the state
def save_tree(name: str, value: object, saving: Saving, own: int | None, held: Callable[[object], bool]) -> None:
    """Add a container (or a bare tensor) of the state."""
    skeleton, tensors = split_tensors(value, name, held)
    if not isinstance(value, torch.Tensor):
        saving.encoded(name, values.encode(skeleton, where=name), own)
    for part, tensor in tensors.items():
        saving.tensor(part, tensor, own)


def load_tree(name: str, live: object, loading: Loading, own: int | None, held: Callable[[object], bool]) -> None:
    """Want the tensors of a container, and put its plain values in place later."""
    _, tensors = split_tensors(live, name, held)
    if isinstance(live, torch.Tensor) or not loading.selects(name):
        for part, tensor in tensors.items():
            if loading.selects(part):
                _want_or_miss(part, tensor, loading, own)
        return
    skeleton = loading.value(name, own)
    if skeleton is ABSENT:
        _absent(name, "a container", loading, own)
        return
    if type(skeleton) is not type(live):
        raise StateMismatch(
            f"saved as a {type(skeleton).__name__}, but the live container is a {type(live).__name__}", where=name
        )
    stored = {reference.name for reference in references(skeleton)}
    loading.missing.update({part: "a tensor" for part in tensors if part not in stored})
    new = join_tensors(skeleton, live, loading, own, in_place=True)

    def stays(item: object) -> bool:
        return isinstance(item, torch.Tensor) or held(item)

    def put() -> None:
        if pour(live, new, stays) is not live:
            raise StateMismatch(f"a {type(live).__name__} of this form cannot be changed in place", where=name)

    if isinstance(live, np.ndarray) and (live.shape, live.dtype) != (new.shape, new.dtype):
        raise StateMismatch(
            f"saved as {new.dtype} {list(new.shape)}, but the live array is {live.dtype} {list(live.shape)}", where=name
        )
    loading.later(2, put)


def _want_or_miss(name: str, tensor: torch.Tensor, loading: Loading, own: int | None) -> None:
    stored = of_rank(name, own)
    if stored in loading.stored:
        loading.want(stored, tensor)
    else:
        _absent(name, "a tensor", loading, own)


def _absent(name: str, what: str, loading: Loading, own: int | None) -> None:
    """A rank that did not exist when the checkpoint was made has nothing of its own in it: that is no mismatch."""
    if own is None or any(rank == own for _, rank in loading.stored_values):
        loading.missing[name] = what
    else:
        loading.noted[name] = f"rank {own} did not exist when this was saved; left as it was made"


def save_object(name: str, value: Stateful, saving: Saving, own: int | None) -> None:
    """Add what an object's `state_dict` says."""
    skeleton, tensors = split_tensors(value.state_dict(), name)
    saving.encoded(name, values.encode(skeleton, where=name), own)
    for part, tensor in tensors.items():
        saving.tensor(part, tensor, own)


def load_object(name: str, live: Stateful, loading: Loading, own: int | None) -> None:
    """Read an object's state into new tensors, and give it to `load_state_dict` later."""
    if not loading.selects(name):
        return
    skeleton = loading.value(name, own)
    if skeleton is ABSENT:
        _absent(name, "an object", loading, own)
        return
    # Only a live tensor knows where (device, mesh) its successor belongs.
    like = live.state_dict() if any(True for _ in references(skeleton)) else ABSENT
    state = join_tensors(skeleton, like, loading, own)

    def put() -> None:
        try:
            live.load_state_dict(state)
        except Exception as error:
            error.add_note(f"while {name!r} was restored by {type(live).__name__}.load_state_dict")
            raise

    loading.later(1, put)
