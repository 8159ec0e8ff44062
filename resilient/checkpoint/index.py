"""A writer's index: lines of JSON in hashed blocks, found through a hashed directory at its end (pure).

    block 0 | block 1 | ... | directory | footer

Blocks hold lines sorted by name: first those of tensors (with their chunks), then those of values. A reader takes
footer and directory in one read of the tail, whose hash the manifest holds, then only the blocks it needs.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilient.checkpoint.document import Fields, digest, dump, load
from resilient.checkpoint.format import MAX_NAME_BYTES, VERSION, IndexRef
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.lines import Line, tensor_lines, value_lines
from resilient.checkpoint.stored import ChunkRecord
from resilient.errors import CheckpointDamaged

MAGIC = b"RSLINDEX"
FOOTER = struct.Struct("<8sIIQQ16s")  # magic, version, zero, directory's offset, its bytes, its xxh3_128
MAX_BLOCK_BYTES = 64 << 10
MAX_BLOCKS = 1 << 20
MAX_TAIL_BYTES = 256 << 20
TENSORS, VALUES = "tensors", "values"


@dataclass(frozen=True, slots=True)
class Block:
    """Where a block lies, and what it must hash to."""

    first: str  # name in its first line; the line before may have the same name
    offset: int  # bytes from the start of the index
    size: int  # bytes
    hash: str  # hex xxh3_128


@dataclass(frozen=True, kw_only=True)
class Directory:
    """The tail of an index, read."""

    tensor_blocks: tuple[Block, ...]
    value_blocks: tuple[Block, ...]

    def blocks_with(self, names: Collection[str] | None) -> tuple[Block, ...]:
        """The blocks of tensors that may hold a line of one of these names; all of them for None."""
        if names is None:
            return self.tensor_blocks
        firsts = [block.first for block in self.tensor_blocks]
        needed: set[int] = set()
        for name in names:
            last = bisect_right(firsts, name) - 1
            # Lines of a long tensor go on over several blocks, each of which then begins with its name.
            while last >= 0:
                needed.add(last)
                if firsts[last] != name:
                    break
                last -= 1
        return tuple(self.tensor_blocks[i] for i in sorted(needed))


@dataclass(frozen=True, kw_only=True)
class BuiltIndex:
    """An index's bytes, and what the manifest must know of them."""

    data: bytes
    tail_bytes: int
    tail_hash: str
    tensors: int
    chunks: int
    values: int


def build_index(
    writer: str,
    tensors: Mapping[str, tuple[TensorInfo, Sequence[ChunkRecord]]],
    values: Mapping[tuple[str, int | None], bytes],
) -> BuiltIndex:
    """The index of what one writer wrote: tensors by name, values by (name, rank). Raises StateInvalid for names."""
    blocks: list[bytes] = []
    directory: dict[str, list[list[object]]] = {TENSORS: [], VALUES: []}
    offset = 0
    for kind, lines in ((TENSORS, tensor_lines(tensors)), (VALUES, value_lines(values))):
        for first, data in _blocks(lines):
            directory[kind].append([first, offset, len(data), digest(data)])
            blocks.append(data)
            offset += len(data)
    body = dump({"writer": writer, **directory}) + b"\n"
    hashed = bytes.fromhex(digest(body))
    tail = body + FOOTER.pack(MAGIC, VERSION, 0, offset, len(body), hashed)
    return BuiltIndex(
        data=b"".join([*blocks, tail]),
        tail_bytes=len(tail),
        tail_hash=digest(tail),
        tensors=len(tensors),
        chunks=sum(len(records) for _, records in tensors.values()),
        values=len(values),
    )


def _blocks(lines: Iterable[Line]) -> Iterator[tuple[str, bytes]]:
    first, size = "", 0
    held: list[bytes] = []
    for line in lines:
        if held and size + len(line.data) + 1 > MAX_BLOCK_BYTES:
            yield first, b"".join(held)
            held, size = [], 0
        if not held:
            first = line.name
        held += [line.data, b"\n"]
        size += len(line.data) + 1
    if held:
        yield first, b"".join(held)


def read_directory(tail: bytes, ref: IndexRef, where: str) -> Directory:
    """The directory in a tail whose hash was compared with the manifest's. Raises CheckpointDamaged."""
    fields = Fields({}, where)
    if len(tail) < FOOTER.size or len(tail) != ref.tail_bytes:
        fields.fail(f"a tail of {len(tail)} bytes, the manifest says {ref.tail_bytes}")
    magic, version, zero, offset, size, hashed = FOOTER.unpack(tail[-FOOTER.size :])
    body = tail[: -FOOTER.size]
    if (magic, version, zero) != (MAGIC, VERSION, 0):
        fields.fail(f"the footer is {magic!r} of version {version}, not {MAGIC!r} of version {VERSION}")
    if size != len(body) or offset + len(tail) != ref.size or bytes.fromhex(digest(body)) != hashed:
        fields.fail(f"the footer speaks of {size} bytes at {offset}, the directory has {len(body)}")
    fields = Fields(load(body, where), where)
    if fields.text("writer") != ref.writer:
        fields.fail(f"it is the index of {fields.text('writer')!r}, not of {ref.writer!r}")
    tensor_blocks, at = _read_blocks(fields, TENSORS, 0)
    value_blocks, at = _read_blocks(fields, VALUES, at)
    if at != offset:
        fields.fail(f"the blocks end at byte {at}, the directory begins at {offset}")
    return Directory(tensor_blocks=tensor_blocks, value_blocks=value_blocks)


def _read_blocks(fields: Fields, kind: str, at: int) -> tuple[tuple[Block, ...], int]:
    """The blocks of one kind, which must follow one another from byte `at`, and where they end."""
    blocks: list[Block] = []
    for item in fields.items(kind, max_items=MAX_BLOCKS):
        block = _read_block(item, fields)
        if block.offset != at or not 0 < block.size <= MAX_BLOCK_BYTES:
            fields.fail(f"block of {block.size} bytes at {block.offset}, after byte {at}")
        if blocks and block.first < blocks[-1].first:
            fields.fail(f"block {block.first[:80]!r} follows {blocks[-1].first[:80]!r}")
        blocks.append(block)
        at += block.size
    return tuple(blocks), at


def _read_block(item: Any, fields: Fields) -> Block:
    if not isinstance(item, list) or len(item) != 4:
        fields.fail(f"a block is [first name, offset, bytes, hash], not {str(item)[:80]!r}")
    entry = Fields(dict(zip(("first", "offset", "bytes", "hash"), item, strict=True)), "")
    try:
        return Block(
            first=entry.text("first", max_chars=MAX_NAME_BYTES),
            offset=entry.integer("offset"),
            size=entry.integer("bytes"),
            hash=entry.hash("hash"),
        )
    except CheckpointDamaged as error:
        fields.fail(error.what)
