"""The entries of a run's log: their fields, their bytes, and the strict reading of untrusted ones (pure)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast

from resilient.errors import EntryInvalid, EntryTooLarge, FormatUnsupported, LogDamaged
from resilient.log.envelope import HASH_CHARS, seal, unseal
from storage.errors import KeyInvalid
from storage.store import check_key

VERSION = 1
MAX_ENTRY_BYTES = 4096
MAX_ADDRESS_CHARS = 256
MAX_SOURCE_CHARS = 512
MAX_NAME_CHARS = 128  # of an axis or a metric
TIERS = ("disk", "object")
"""Where a commit's data can be. Memory is never a commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ref:
    """An object named by its key and by what it must hold."""

    key: str
    hash: str  # hex xxh3_128 of the object's bytes
    size: int  # bytes


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class State:
    """The state of a run after `step` completed steps of a generation."""

    generation: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """Who leads from here on. Its slot is the epoch's number."""

    nonce: str
    address: str  # where the leader listens, for people and would-be leaders
    wall_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One formation of the world, and the state all its ranks go on from. Its slot is the generation's number."""

    epoch: int
    nonce: str
    members: int  # ranks
    layout: Mapping[str, int]  # sizes of the axes
    restored: State | None  # None: from the newest commit, or from the beginning where there is none
    source: str  # where it was read from: a tier, another run's URL, "" for none


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """A checkpoint exists: this entry is the commit."""

    epoch: int
    nonce: str
    generation: int
    step: int  # completed steps
    restore_step: int  # of the generation, so that it is known even if the generation's own entry is damaged
    tier: str  # one of TIERS
    manifest: Ref
    uses: tuple[Ref, ...] = ()  # manifests of other commits whose data this one refers to
    metrics: Mapping[str, float] = field(default_factory=dict)
    wall_ns: int = 0

    @property
    def state(self) -> State:
        """What it is a checkpoint of."""
        return State(generation=self.generation, step=self.step)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Manifests condemned: what only they refer to may be deleted once this entry is in the log."""

    epoch: int
    nonce: str
    manifests: tuple[Ref, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The log before `upto` is summed up in an object, so that a reader can start there."""

    epoch: int
    nonce: str
    summary: Ref
    upto: int  # the summary covers the slots 0 .. upto-1
    previous: int | None  # slot of the base before, tried when this one's summary is gone


Entry = Epoch | Generation | Commit | Drop | Base


# ---- reading single fields: each takes what JSON gave and returns the field's value, or raises EntryInvalid
def _need(good: bool, what: str, value: object) -> None:
    if not good:
        raise EntryInvalid(f"{what}, not {str(value)[:80]!r}")


def read_int(value: Any) -> int:
    """A whole number from 0 to 2**63-1. Raises EntryInvalid."""
    _need(type(value) is int and 0 <= value < 1 << 63, "expected a whole number from 0 to 2**63-1", value)
    return cast(int, value)


def read_optional_int(value: Any) -> int | None:
    """A whole number or null. Raises EntryInvalid."""
    return None if value is None else read_int(value)


def read_hex(chars: int) -> Callable[[Any], str]:
    """A reader of exactly `chars` lower-case hex digits. Raises EntryInvalid."""

    def read(value: Any) -> str:
        good = isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{chars}}}", value) is not None
        _need(good, f"expected {chars} hex digits", value)
        return cast(str, value)

    return read


def read_text(limit: int) -> Callable[[Any], str]:
    """A reader of text of at most `limit` characters. Raises EntryInvalid."""

    def read(value: Any) -> str:
        _need(isinstance(value, str) and len(value) <= limit, f"expected text of at most {limit} characters", value)
        return cast(str, value)

    return read


def _read_tier(value: Any) -> str:
    _need(isinstance(value, str) and value in TIERS, f"expected one of {', '.join(TIERS)}", value)
    return cast(str, value)


def _read_sizes(value: Any) -> dict[str, int]:
    _need(isinstance(value, dict), "expected axes and their sizes", value)
    return {read_text(MAX_NAME_CHARS)(name): read_int(size) for name, size in value.items()}


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _read_metric(value: Any) -> float:
    if isinstance(value, str):
        _need(value in _NOT_FINITE, "expected a number", value)
        return _NOT_FINITE[value]
    _need(type(value) is float and math.isfinite(value), "expected a number", value)
    return cast(float, value)


def _read_metrics(value: Any) -> dict[str, float]:
    _need(isinstance(value, dict), "expected names and numbers", value)
    return {read_text(MAX_NAME_CHARS)(name): _read_metric(number) for name, number in value.items()}


def read_ref(value: Any) -> Ref:
    """`[key, hash, size]`. Raises EntryInvalid."""
    _need(
        isinstance(value, list) and len(value) == 3 and isinstance(value[0], str), "expected [key, hash, size]", value
    )
    try:
        key = check_key(value[0])
    except KeyInvalid as error:
        raise EntryInvalid(error.what) from error
    return Ref(key=key, hash=read_hex(HASH_CHARS)(value[1]), size=read_int(value[2]))


def read_refs(value: Any) -> tuple[Ref, ...]:
    """A list of references, none twice. Raises EntryInvalid."""
    _need(isinstance(value, list), "expected a list of references", value)
    refs = tuple(read_ref(ref) for ref in value)
    _need(len({ref.key for ref in refs}) == len(refs), "expected each reference once", value)
    return refs


def read_state(value: Any) -> State | None:
    """`[generation, step]` or null. Raises EntryInvalid."""
    if value is None:
        return None
    _need(isinstance(value, list) and len(value) == 2, "expected [generation, step] or null", value)
    return State(generation=read_int(value[0]), step=read_int(value[1]))


_nonce = read_hex(16)
READERS: dict[type[Entry], dict[str, Callable[[Any], Any]]] = {
    Epoch: {"nonce": _nonce, "address": read_text(MAX_ADDRESS_CHARS), "wall_ns": read_int},
    Generation: {
        "epoch": read_int, "nonce": _nonce, "members": read_int, "layout": _read_sizes,
        "restored": read_state, "source": read_text(MAX_SOURCE_CHARS),
    },
    Commit: {
        "epoch": read_int, "nonce": _nonce, "generation": read_int, "step": read_int, "restore_step": read_int,
        "tier": _read_tier, "manifest": read_ref, "uses": read_refs, "metrics": _read_metrics, "wall_ns": read_int,
    },
    Drop: {"epoch": read_int, "nonce": _nonce, "manifests": read_refs},
    Base: {
        "epoch": read_int, "nonce": _nonce, "summary": read_ref, "upto": read_int, "previous": read_optional_int,
    },
}  # fmt: skip
KINDS: dict[str, type[Entry]] = {kind.__name__.lower(): kind for kind in READERS}


def to_json(value: object) -> object:
    """The JSON value of a field; what the readers above take back."""
    if isinstance(value, Ref):
        return [value.key, value.hash, value.size]
    if isinstance(value, State):
        return [value.generation, value.step]
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def body_of(record: Entry) -> dict[str, object]:
    """The entry as a JSON object, without its hash."""
    values = {item.name: to_json(getattr(record, item.name)) for item in fields(record)}
    return {"v": VERSION, "kind": type(record).__name__.lower(), **values}


def entry_of(body: Mapping[str, Any]) -> Entry:
    """The entry that a JSON object describes. Raises EntryInvalid, FormatUnsupported."""
    version, kind = body.get("v"), body.get("kind")
    if type(version) is int and version > VERSION:
        raise FormatUnsupported(f"written in version {version} of the log, this reader knows {VERSION}", next="update")
    if type(version) is not int or version != VERSION or not isinstance(kind, str) or kind not in KINDS:
        raise EntryInvalid(f"no entry of version {version!r} and kind {kind!r}")
    readers = READERS[KINDS[kind]]
    if set(body) != {"v", "kind", *readers}:
        raise EntryInvalid(f"{kind} has the fields {sorted(body)}, not {sorted(readers)}")
    values = {}
    for name, read in readers.items():
        try:
            values[name] = read(body[name])
        except EntryInvalid as error:
            raise EntryInvalid(f"{kind}.{name}: {error.what}") from error
    return KINDS[kind](**values)


def encode(entry: Entry) -> bytes:
    """The bytes of an entry. Raises EntryInvalid; EntryTooLarge above MAX_ENTRY_BYTES."""
    data = seal(body_of(entry))
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryTooLarge(
            f"a {type(entry).__name__.lower()} entry of {len(data)} bytes, {MAX_ENTRY_BYTES} are allowed",
            next="fewer or shorter metrics, axes or references",
        )
    entry_of(unseal(data))  # what no reader would take is never written
    return data


def decode(data: bytes, where: str = "") -> Entry:
    """The entry in these untrusted bytes. Raises LogDamaged; FormatUnsupported if a newer version wrote it."""
    if len(data) > MAX_ENTRY_BYTES:
        raise LogDamaged(f"{len(data)} bytes, an entry has at most {MAX_ENTRY_BYTES}", where=where)
    body = unseal(data, where)
    try:
        return entry_of(body)
    except EntryInvalid as error:
        raise LogDamaged(f"the hash is right, the fields are not: {error.what}", where=where) from error
