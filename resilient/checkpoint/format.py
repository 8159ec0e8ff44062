"""The manifest: what a checkpoint consists of, as a value and as bytes (pure). See docs/checkpoint-format.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from resilient.checkpoint.document import Fields, dump, is_numbers, load
from resilient.errors import CheckpointDamaged, FormatUnsupported
from storage.errors import KeyInvalid
from storage.store import check_key

FORMAT = "resilient-checkpoint"
VERSION = 1

MAX_MANIFEST_BYTES = 64 << 20
MAX_WRITERS = 1 << 17
MAX_PARTS = 1 << 20  # of one writer
MAX_TABLE = 4096  # axes, metrics, other checkpoints referred to
MAX_CHUNK_BYTES = 64 << 20
"""Raw bytes of a chunk that a reader must take; writers make them of 4 MiB at most."""
MAX_DIMS = 64
MAX_NAME_BYTES = 1024

_PREFIX = re.compile(r"data/[0-9]{8,19}/[0-9]{12,19}/([0-9a-f]{16})")
_WRITER = re.compile(r"[a-z][a-z0-9]{0,31}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRef:
    """An object that holds chunks."""

    key: str
    size: int  # bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexRef:
    """What one writer wrote: its index, by the hash of the index's tail, and its parts."""

    writer: str
    key: str
    size: int  # bytes of the index
    tail_bytes: int  # of its directory and footer, which vouch for all the rest of it
    tail_hash: str  # hex xxh3_128 of these
    parts: tuple[PartRef, ...]
    tensors: int  # that have a line here
    chunks: int
    values: int
    raw_bytes: int  # of all chunks
    stored_bytes: int  # of all chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One checkpoint. The commit entry of the log names it by key, size and hash."""

    prefix: str  # data/<generation>/<step>/<nonce>
    step: int  # completed steps
    generation: int
    restore_step: int | None  # of the generation
    layout: Mapping[str, int]  # sizes of the axes
    world_size: int
    writers: tuple[IndexRef, ...]  # ascending by writer
    metrics: Mapping[str, float] = field(default_factory=dict)
    torch: str = ""  # version that the state came from
    wall_ns: int = 0
    refers: tuple[str, ...] = ()  # prefixes of earlier checkpoints some of whose parts this one needs

    @property
    def key(self) -> str:
        """Where it lies."""
        return manifest_key(self.prefix)

    @property
    def raw_bytes(self) -> int:
        """Of all chunks of all writers."""
        return sum(writer.raw_bytes for writer in self.writers)

    @property
    def stored_bytes(self) -> int:
        """Of all chunks of all writers."""
        return sum(writer.stored_bytes for writer in self.writers)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every object under its own prefix, the manifest last."""
        own = [part.key for writer in self.writers for part in writer.parts if part.key.startswith(self.prefix + "/")]
        return (*own, *(writer.key for writer in self.writers), self.key)


def data_prefix(generation: int, step: int, nonce: str) -> str:
    """Under which all objects of one attempt at a save lie. `nonce`: 16 hex digits."""
    return check_key(f"data/{generation:08d}/{step:012d}/{nonce}")


def writer_name(node: int) -> str:
    """The name of a node as a writer."""
    return f"n{node:05d}"


def part_key(prefix: str, writer: str, number: int) -> str:
    """The key of a writer's part."""
    return f"{prefix}/{writer}.{number:05d}"


def index_key(prefix: str, writer: str) -> str:
    """The key of a writer's index."""
    return f"{prefix}/{writer}.index"


def manifest_key(prefix: str) -> str:
    """The key of a checkpoint's manifest."""
    return f"{prefix}/manifest"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes: one JSON object. Raises CheckpointDamaged for one that no reader would take."""
    data = dump(
        {
            "format": FORMAT,
            "version": VERSION,
            "prefix": manifest.prefix,
            "step": manifest.step,
            "generation": manifest.generation,
            "restore_step": manifest.restore_step,
            "layout": dict(manifest.layout),
            "world_size": manifest.world_size,
            "torch": manifest.torch,
            "wall_ns": manifest.wall_ns,
            "metrics": {name: number_json(value) for name, value in manifest.metrics.items()},
            "refers": list(manifest.refers),
            "writers": [index_ref_json(manifest.prefix, ref) for ref in manifest.writers],
        }
    )
    decode_manifest(data + b"\n", key=manifest.key)  # what no reader would take is never written
    return data + b"\n"


def decode_manifest(data: bytes, *, key: str, where: str = "") -> Manifest:
    """The manifest in bytes whose hash was compared. `key`: where it lay, which must be where it says it lies.

    Raises CheckpointDamaged; FormatUnsupported if a newer version wrote it.
    """
    where = where or key
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointDamaged(f"a manifest of {len(data)} bytes, {MAX_MANIFEST_BYTES} are allowed", where=where)
    fields = Fields(load(data, where), where)
    if fields.get("format") != FORMAT:
        fields.fail(f"it is not a {FORMAT}, but {str(fields.get('format'))[:80]!r}")
    version = fields.integer("version", low=1)
    if version > VERSION:
        raise FormatUnsupported(
            f"written in version {version} of the format, this reader knows up to {VERSION}",
            where=where,
            next="update resilient-training",
        )
    prefix = fields.text("prefix")
    parsed = _PREFIX.fullmatch(prefix)
    step, generation = fields.integer("step"), fields.integer("generation")
    if not parsed or prefix != data_prefix(generation, step, parsed[1]) or key != manifest_key(prefix):
        fields.fail(f"prefix {prefix[:80]!r}, generation {generation} and step {step} do not lie at this key")
    refers = tuple(fields.items("refers", max_items=MAX_TABLE))
    for other in refers:
        if not isinstance(other, str) or not _PREFIX.fullmatch(other) or other == prefix or refers.count(other) > 1:
            fields.fail(f"refers to {str(other)[:80]!r}, which is not the prefix of another checkpoint")
    writers = tuple(
        index_ref_of(item, prefix=prefix, refers=refers, where=where)
        for item in fields.items("writers", max_items=MAX_WRITERS)
    )
    names = [ref.writer for ref in writers]
    if names != sorted(set(names)):
        fields.fail("the writers are not in ascending order, each once")
    return Manifest(
        prefix=prefix,
        step=step,
        generation=generation,
        restore_step=None if fields.get("restore_step") is None else fields.integer("restore_step"),
        layout=fields.table("layout", _read_size, max_items=MAX_TABLE),
        world_size=fields.integer("world_size", low=1),
        writers=writers,
        metrics=fields.table("metrics", _read_number, max_items=MAX_TABLE),
        torch=fields.text("torch"),
        wall_ns=fields.integer("wall_ns"),
        refers=refers,
    )


def index_ref_json(prefix: str, ref: IndexRef) -> dict[str, object]:
    """An IndexRef as a JSON value. Own parts are given by their sizes alone: their keys follow from their numbers."""
    parts = [
        part.size if part.key == part_key(prefix, ref.writer, number) else [part.key, part.size]
        for number, part in enumerate(ref.parts)
    ]
    return {
        "writer": ref.writer,
        "index_bytes": ref.size,
        "tail_bytes": ref.tail_bytes,
        "tail_hash": ref.tail_hash,
        "parts": parts,
        "tensors": ref.tensors,
        "chunks": ref.chunks,
        "values": ref.values,
        "raw_bytes": ref.raw_bytes,
        "stored_bytes": ref.stored_bytes,
    }


def index_ref_of(value: object, *, prefix: str, refers: tuple[str, ...] = (), where: str = "") -> IndexRef:
    """The IndexRef that `index_ref_json` described. Raises CheckpointDamaged."""
    fields = Fields(value, where)
    writer = fields.text("writer", _WRITER.pattern)
    size = fields.integer("index_bytes")
    parts = tuple(
        _part(item, number, prefix=prefix, refers=refers, writer=writer, fields=fields)
        for number, item in enumerate(fields.items("parts", max_items=MAX_PARTS))
    )
    return IndexRef(
        writer=writer,
        key=index_key(prefix, writer),
        size=size,
        tail_bytes=fields.integer("tail_bytes", low=1, high=size),
        tail_hash=fields.hash("tail_hash"),
        parts=parts,
        tensors=fields.integer("tensors"),
        chunks=fields.integer("chunks"),
        values=fields.integer("values"),
        raw_bytes=fields.integer("raw_bytes"),
        stored_bytes=fields.integer("stored_bytes"),
    )


def _part(item: Any, number: int, *, prefix: str, refers: tuple[str, ...], writer: str, fields: Fields) -> PartRef:
    if is_numbers([item], 1):
        return PartRef(key=part_key(prefix, writer, number), size=item)
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str) or not is_numbers(item[1:], 1):
        fields.fail(f"part {number} of {writer} is neither a size nor a key with a size: {str(item)[:80]!r}")
    key, size = item
    try:
        check_key(key)
    except KeyInvalid as error:
        fields.fail(f"part {number} of {writer}: {error.what}")
    if not any(key.startswith(other + "/") for other in refers):
        fields.fail(f"part {number} of {writer} lies at {key!r}, outside of what this checkpoint may refer to")
    return PartRef(key=key, size=size)


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def number_json(value: float) -> float | str:
    """A float as JSON holds it: what is not finite becomes a string."""
    value = float(value)
    if math.isnan(value):
        return "nan"
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _read_number(value: Any) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) < 1 << 53:
        return float(value)
    raise ValueError(f"{str(value)[:80]!r} is not a number")


def _read_size(value: Any) -> int:
    if not is_numbers([value], 1):
        raise ValueError(f"{str(value)[:80]!r} is not a size")
    return int(value)
