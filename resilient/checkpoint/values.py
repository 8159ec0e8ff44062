"""Plain values as tagged JSON: lossless, deterministic, bounded (no torch, never pickle).

null, true, false, strings, integers, finite floats (always with `.` or `e`) and lists are JSON's own. A dict whose
keys are all strings, none beginning with `$`, is a JSON object. Everything else is an object with one key:

    $float [16 hex digits]    nan, inf: the IEEE-754 bits      $map [[key, value], ...]      dict with other keys
    $int "hex"                beyond 64 bits                    $ordered / $counter [[k, v], ...]
    $tuple $set $frozenset [items]                              $default [factory, [[k, v], ...]]   defaultdict
    $bytes / $bytearray "base64"                                $deque [maxlen, items]
    $complex [re, im]         two floats                        $range [start, stop, step]
    $scalar [dtype, "base64"]           NumPy scalar            $array [dtype, shape, "base64"]   C order
    $tensor "name"            a tensor stored under that name   $held "name"    an object stored under that name
    $dtype "float32"  $device "cuda:0"  $size [..]              torch's

Dict order is kept; items of sets are sorted by their encoding. Two references to one object become two objects.
"""

from __future__ import annotations

import base64
import functools
import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from resilient.errors import CheckpointDamaged, StateInvalid

MAX_BYTES = 256 << 20
"""Bound on one encoded value; larger things are tensors."""
MAX_DEPTH = 64
_DTYPE = re.compile(r"[<>|=]?([biufcSUV]\d{1,5}|[mM]8(\[\d{0,9}[A-Za-z]{1,2}\])?)")
_FACTORIES: dict[str, Callable[[], object]] = {
    kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple, bool, Counter, OrderedDict, deque)
}
Json = Any


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands in a value where a tensor was, which is stored under `name`."""

    name: str


@dataclass(frozen=True, slots=True)
class HeldRef:
    """Stands in a value where an object with entries of its own was (a module, an optimizer), stored under `name`."""

    name: str


def encode(value: object, *, where: str = "state") -> bytes:
    """ASCII JSON, the same bytes for the same value in any process.

    Raises StateInvalid, naming the path below `where`, for a type that does not survive exactly, for one nested more
    than MAX_DEPTH deep (a container that holds itself), and for more than MAX_BYTES.
    """
    data = _dump(_pack(value, where, MAX_DEPTH))
    if len(data) > MAX_BYTES:
        raise StateInvalid(
            f"a plain value takes {len(data)} bytes, more than {MAX_BYTES}",
            where=where,
            next="keep large data in tensors",
        )
    return data


def decode(data: bytes, *, where: str = "value") -> Any:
    """The value that `encode` was given. Raises CheckpointDamaged for anything that `encode` does not write."""
    if len(data) > MAX_BYTES:
        raise CheckpointDamaged(f"a value of {len(data)} bytes is larger than {MAX_BYTES}", where=where)
    try:
        return _unpack(json.loads(data, parse_constant=_refuse_constant), MAX_DEPTH)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, AttributeError, struct.error) as error:
        raise CheckpointDamaged(f"a plain value cannot be decoded: {error}", where=where) from error


@functools.lru_cache(maxsize=4096)
def digest(data: bytes) -> str:
    """Hex xxh3_128 by which ranks compare an encoded value; the order of a plain dict's items does not count."""
    return xxhash.xxh3_128_hexdigest(_dump(_unordered(json.loads(data))))


def _dump(packed: Json) -> bytes:
    return json.dumps(packed, separators=(",", ":"), allow_nan=False).encode("ascii")


# ---- packing
def _pack(value: object, where: str, depth: int) -> Json:
    if depth == 0:
        raise StateInvalid(f"nested more than {MAX_DEPTH} deep; does it contain itself?", where=where)
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    packer = _PACKERS.get(kind)
    if packer is not None:
        return packer(value, where, depth - 1)
    if isinstance(value, np.generic) and _DTYPE.fullmatch(value.dtype.str):
        return {"$scalar": [value.dtype.str, _base64(value.tobytes())]}
    if kind.__module__.partition(".")[0] == "torch":
        packed = _pack_torch(value)
        if packed is not None:
            return packed
    raise StateInvalid(
        f"a {kind.__module__}.{kind.__qualname__} is not a plain value that survives exactly",
        where=where,
        next="give it state_dict() and load_state_dict(), or keep a number, string, list, tuple, dict, set, bytes, "
        "NumPy array or tensor instead",
    )


def _pack_int(value: int, _where: str, _depth: int) -> Json:
    return value if -(1 << 63) <= value < 1 << 63 else {"$int": f"{value:x}"}


def _pack_float(value: float, _where: str, _depth: int) -> Json:
    return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}


def _items(values: Iterable[object], where: str, depth: int) -> list[Json]:
    return [_pack(item, f"{where}[{index}]", depth) for index, item in enumerate(values)]


def _pairs(mapping: dict[Any, Any], where: str, depth: int) -> list[Json]:
    return [[_pack(k, f"{where} key", depth), _pack(v, f"{where}[{k!r}]", depth)] for k, v in mapping.items()]


def _pack_dict(value: dict[Any, Any], where: str, depth: int) -> Json:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _pack(item, f"{where}[{key!r}]", depth) for key, item in value.items()}
    return {"$map": _pairs(value, where, depth)}


def _pack_set(tag: str) -> Callable[[Any, str, int], Json]:
    return lambda value, where, depth: {tag: sorted(_items(value, where, depth), key=_dump)}


def _pack_default(value: defaultdict[Any, Any], where: str, depth: int) -> Json:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if name is not None and _FACTORIES.get(name) is not factory:
        raise StateInvalid(
            f"a defaultdict whose factory is {factory!r} cannot be restored",
            where=where,
            next=f"use one of {', '.join(_FACTORIES)}, or a dict",
        )
    return {"$default": [name, _pairs(value, where, depth)]}


def _pack_array(value: np.ndarray[Any, Any], where: str, _depth: int) -> Json:
    if not _DTYPE.fullmatch(value.dtype.str) or value.dtype.hasobject:
        raise StateInvalid(f"a NumPy array of dtype {value.dtype} is not a plain value", where=where)
    return {"$array": [value.dtype.str, list(value.shape), _base64(value.tobytes())]}


def _pack_torch(value: Any) -> Json:
    """torch's own plain types, if torch is loaded."""
    torch = sys.modules["torch"]
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    return {"$size": list(value)} if isinstance(value, torch.Size) else None


_PACKERS: dict[type, Callable[[Any, str, int], Json]] = {
    int: _pack_int,
    float: _pack_float,
    list: _items,
    dict: _pack_dict,
    tuple: lambda value, where, depth: {"$tuple": _items(value, where, depth)},
    set: _pack_set("$set"),
    frozenset: _pack_set("$frozenset"),
    bytes: lambda value, _where, _depth: {"$bytes": _base64(value)},
    bytearray: lambda value, _where, _depth: {"$bytearray": _base64(value)},
    complex: lambda value, where, depth: {"$complex": _items((value.real, value.imag), where, depth)},
    range: lambda value, where, depth: {"$range": _items((value.start, value.stop, value.step), where, depth)},
    OrderedDict: lambda value, where, depth: {"$ordered": _pairs(value, where, depth)},
    Counter: lambda value, where, depth: {"$counter": _pairs(value, where, depth)},
    defaultdict: _pack_default,
    deque: lambda value, where, depth: {"$deque": [value.maxlen, _items(value, where, depth)]},
    np.ndarray: _pack_array,
    TensorRef: lambda value, _where, _depth: {"$tensor": value.name},
    HeldRef: lambda value, _where, _depth: {"$held": value.name},
}


# ---- unpacking
def _unpack(packed: Json, depth: int) -> Any:
    if depth < 0:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(packed, list):
        return [_unpack(item, depth - 1) for item in packed]
    if not isinstance(packed, dict):
        return packed
    tag = next(iter(packed), "")
    if not tag.startswith("$"):
        if any(key.startswith("$") for key in packed):
            raise ValueError("a tag among the keys of an object")
        return {key: _unpack(item, depth - 1) for key, item in packed.items()}
    if len(packed) != 1:
        raise ValueError(f"a tagged value has one key, not {len(packed)}")
    return _UNPACKERS[tag](packed[tag], depth - 1)


def _unpairs(packed: Json, depth: int) -> list[tuple[Any, Any]]:
    return [(_unpack(key, depth), _unpack(value, depth)) for key, value in packed]


def _unpack_float(packed: Json, _depth: int) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(packed))
    return float(value)


def _unpack_default(packed: Json, depth: int) -> defaultdict[Any, Any]:
    name, pairs = packed
    return defaultdict(None if name is None else _FACTORIES[name], _unpairs(pairs, depth))


def _unpack_array(packed: Json, _depth: int) -> np.ndarray[Any, Any]:
    name, shape, text = packed
    dtype = _dtype(name)
    data = base64.b64decode(text, validate=True)
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are not a {name} array of shape {shape}")
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()


def _unpack_scalar(packed: Json, _depth: int) -> Any:
    name, text = packed
    (value,) = np.frombuffer(base64.b64decode(text, validate=True), dtype=_dtype(name))
    return value


def _dtype(name: Json) -> np.dtype[Any]:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"{name!r} is not a NumPy dtype that values hold")
    return np.dtype(name)


def _torch(make: Callable[[Any, Json], Any]) -> Callable[[Json, int], Any]:
    def unpack(packed: Json, _depth: int) -> Any:
        import torch  # only a value that holds torch's types needs it

        return make(torch, packed)

    return unpack


def _torch_dtype(torch: Any, name: Json) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is not a torch dtype")
    return found


def _text(packed: Json) -> str:
    if not isinstance(packed, str):
        raise TypeError(f"a string was expected, not {packed!r:.80}")
    return packed


_UNPACKERS: dict[str, Callable[[Json, int], Any]] = {
    "$int": lambda packed, _: int(_text(packed), 16),
    "$float": _unpack_float,
    "$map": lambda packed, depth: dict(_unpairs(packed, depth)),
    "$tuple": lambda packed, depth: tuple(_unpack(item, depth) for item in packed),
    "$set": lambda packed, depth: {_unpack(item, depth) for item in packed},
    "$frozenset": lambda packed, depth: frozenset(_unpack(item, depth) for item in packed),
    "$bytes": lambda packed, _: base64.b64decode(packed, validate=True),
    "$bytearray": lambda packed, _: bytearray(base64.b64decode(packed, validate=True)),
    "$complex": lambda packed, depth: complex(*(_unpack(item, depth) for item in packed)),
    "$range": lambda packed, depth: range(*(_unpack(item, depth) for item in packed)),
    "$ordered": lambda packed, depth: OrderedDict(_unpairs(packed, depth)),
    "$counter": lambda packed, depth: Counter(dict(_unpairs(packed, depth))),
    "$default": _unpack_default,
    "$deque": lambda packed, depth: deque((_unpack(item, depth) for item in packed[1]), maxlen=packed[0]),
    "$array": _unpack_array,
    "$scalar": _unpack_scalar,
    "$tensor": lambda packed, _: TensorRef(_text(packed)),
    "$held": lambda packed, _: HeldRef(_text(packed)),
    "$dtype": _torch(_torch_dtype),
    "$device": _torch(lambda torch, packed: torch.device(packed)),
    "$size": _torch(lambda torch, packed: torch.Size(packed)),
}


def _unordered(packed: Json) -> Json:
    if isinstance(packed, list):
        return [_unordered(item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if next(iter(packed), "") in ("$map", "$counter"):
        (tag,) = packed
        return {tag: sorted(_unordered(packed[tag]), key=_dump)}
    return {key: _unordered(packed[key]) for key in sorted(packed)}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
