"""What clients and keepers tell each other, as values: facts of a save, layouts of a snapshot, outcomes (pure)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import Shard, Slot, TensorInfo
from resilient.errors import WireError

Value = tuple[str, int | None, bytes]
"""(name, rank or None where all ranks hold the same, encoded bytes)"""


@dataclass(frozen=True, order=True)
class SaveId:
    """One attempt to save a step."""

    step: int
    nonce: str

    def body(self, kind: str) -> dict[str, Any]:
        """A message of this kind about it."""
        return {"t": kind, "step": self.step, "nonce": self.nonce}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is said of a save once, by all ranks alike (metrics: rank 0's count)."""

    writers: int  # nodes
    members: int  # ranks
    layout: Mapping[str, int] = field(default_factory=dict)
    restored: tuple[int, int] | None = None  # generation and step that the ranks went on from
    restored_at: int | None = None  # log slots read when that was chosen (or nothing was found)
    source: str = ""  # where that was read from
    formation: int = 0  # counts restores of one session, so that each opens a generation of its own
    replace: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def shared(self) -> dict[str, Any]:
        """What must be equal on every rank."""
        value = asdict(self)
        del value["metrics"]
        return value


@dataclass(frozen=True, kw_only=True)
class CommitInfo:
    """What became of a save that was committed."""

    step: int
    generation: int
    slot: int  # of the commit entry in the log
    manifest: str  # key
    raw_bytes: int
    stored_bytes: int
    persist_s: float  # of the slowest node
    total_s: float  # from the first node's seal to the commit


def encode_facts(facts: Facts) -> dict[str, Any]:
    """As a JSON value; metrics that are no numbers are left out."""
    value = asdict(facts)
    value["metrics"] = {name: number for name, number in facts.metrics.items() if math.isfinite(number)}
    return value


def decode_facts(value: Any) -> Facts:
    """The facts that `encode_facts` wrote. Raises WireError."""
    try:
        restored = value["restored"]
        return Facts(
            writers=int(value["writers"]),
            members=int(value["members"]),
            layout={str(axis): int(size) for axis, size in value["layout"].items()},
            restored=None if restored is None else (int(restored[0]), int(restored[1])),
            restored_at=None if value["restored_at"] is None else int(value["restored_at"]),
            source=str(value["source"]),
            formation=int(value["formation"]),
            replace=bool(value["replace"]),
            metrics={str(name): float(number) for name, number in value["metrics"].items()},
        )
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise WireError(f"the facts of a save cannot be read: {error!r}") from error


def decode_info(value: Any) -> CommitInfo:
    """Raises WireError."""
    try:
        return CommitInfo(**value)
    except TypeError as error:
        raise WireError(f"a commit's description cannot be read: {error}") from error


def encode_slots(slots: Sequence[Slot]) -> bytes:
    """JSON; a tensor that occurs in several slots is written once."""
    tensors: dict[TensorInfo, int] = {}
    rows = [
        [tensors.setdefault(s.shard.tensor, len(tensors)), s.shard.box.start, s.shard.box.shape, s.offset]
        for s in slots
    ]
    return json.dumps(
        {"tensors": [[t.name, t.dtype, t.shape] for t in tensors], "slots": rows}, separators=(",", ":")
    ).encode()


def decode_slots(data: bytes) -> tuple[Slot, ...]:
    """The slots that `encode_slots` wrote. Raises WireError."""
    try:
        value = json.loads(data)
        tensors = [TensorInfo(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in value["tensors"]]
        return tuple(
            Slot(shard=Shard(tensor=tensors[index], box=Box(tuple(start), tuple(shape))), offset=int(offset))
            for index, start, shape, offset in value["slots"]
        )
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise WireError(f"the layout of a snapshot cannot be read: {error!r}") from error


def check_slots(slots: Sequence[Slot], nbytes: int) -> None:
    """Raises WireError where a slot leaves the arena."""
    for slot in slots:
        if slot.offset < 0 or slot.offset + slot.shard.nbytes > nbytes:
            raise WireError(
                f"{slot.shard.nbytes} bytes at {slot.offset} are outside an arena of {nbytes} bytes",
                where=slot.shard.tensor.name,
            )


def encode_values(values: Sequence[Value]) -> tuple[list[Any], bytes]:
    """A JSON list of [name, rank, length], and the bytes one after the other."""
    return [[name, rank, len(data)] for name, rank, data in values], b"".join(data for _, _, data in values)


def decode_values(table: Any, blob: bytes) -> tuple[Value, ...]:
    """The values that `encode_values` wrote. Raises WireError."""
    values: list[Value] = []
    at = 0
    try:
        for name, rank, length in table:
            if not isinstance(name, str) or not (rank is None or isinstance(rank, int)) or not 0 <= length <= len(blob):
                raise WireError(f"a value is called {name!r}, rank {rank!r}, {length!r} bytes")
            values.append((name, rank, blob[at : at + length]))
            at += length
    except (TypeError, ValueError) as error:
        raise WireError(f"the values of a save cannot be read: {error!r}") from error
    if at != len(blob):
        raise WireError(f"the values of a save have {at} bytes, {len(blob)} came")
    return tuple(values)
