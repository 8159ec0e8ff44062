"""The lines of an index: tensors with their chunks, values; written sorted, read strictly (pure).

    {"name":N,"dtype":D,"shape":[..],"chunks":[[start,shape,part,offset,stored_bytes,codec,raw_hash,stored_hash],..]}
    {"name":N,"rank":null,"piece":0,"pieces":1,"value":"..."}

A tensor of many chunks, or a long value, goes on in the next line, which repeats its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resilient.checkpoint.document import HASH_HEX, Fields, dump, is_numbers, load
from resilient.checkpoint.format import MAX_CHUNK_BYTES, MAX_DIMS, MAX_NAME_BYTES, IndexRef
from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import ITEM_BYTES, TensorInfo
from resilient.checkpoint.stored import ChunkRecord
from resilient.errors import StateInvalid

LINE_BYTES = 24 << 10
"""About the length at which a line ends and the next one goes on; a block has room for at least one line."""
_VALUE_CHARS = 8 << 10
MAX_LINE_CHARS = 64 << 10
MAX_TENSOR_BYTES = 1 << 60
MAX_RANK = 1 << 31


@dataclass(frozen=True, slots=True)
class Line:
    """One line, without its newline."""

    name: str
    data: bytes


def tensor_lines(tensors: Mapping[str, tuple[TensorInfo, Sequence[ChunkRecord]]]) -> Iterator[Line]:
    """The lines of tensors, ascending by name; a tensor without chunks here has one line too."""
    for name in sorted(tensors):
        info, records = tensors[name]
        check_name(name)
        held: list[object] = []
        size = 0
        for record in sorted(records, key=lambda record: record.box.start):
            if size > LINE_BYTES:
                yield _tensor_line(info, held)
                held, size = [], 0
            held.append(_chunk_json(record))
            size += 180 + 40 * len(record.box.start)
        yield _tensor_line(info, held)


def value_lines(values: Mapping[tuple[str, int | None], bytes]) -> Iterator[Line]:
    """The lines of values, ascending by name, then rank (none first)."""
    for name, rank in sorted(values, key=lambda item: (item[0], -1 if item[1] is None else item[1])):
        check_name(name)
        text = values[name, rank].decode("utf-8")
        cuts = range(0, max(1, len(text)), _VALUE_CHARS)
        for piece, at in enumerate(cuts):
            yield Line(
                name,
                dump(
                    {
                        "name": name,
                        "rank": rank,
                        "piece": piece,
                        "pieces": len(cuts),
                        "value": text[at : at + _VALUE_CHARS],
                    }
                ),
            )


def _tensor_line(info: TensorInfo, chunks: list[object]) -> Line:
    return Line(info.name, dump({"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "chunks": chunks}))


def _chunk_json(record: ChunkRecord) -> list[object]:
    return [
        list(record.box.start),
        list(record.box.shape),
        record.part,
        record.offset,
        record.stored_bytes,
        record.codec,
        record.raw_hash.hex(),
        record.stored_hash.hex(),
    ]


def check_name(name: str) -> None:
    """Raises StateInvalid unless `name` may be that of a tensor or a value."""
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise StateInvalid(f"a name must be Unicode text: {name!r}") from error
    if not 0 < size <= MAX_NAME_BYTES:
        raise StateInvalid(
            f"the name {name[:80]!r} has {size} bytes, 1 to {MAX_NAME_BYTES} are allowed", next="use shorter names"
        )


class TensorReader:
    """Takes the lines of one index's tensor blocks in order; refuses what is out of order or out of bounds."""

    def __init__(self, ref: IndexRef, where: str) -> None:
        self._ref, self._where = ref, where
        self._last = ""
        self.found: dict[str, tuple[TensorInfo, list[ChunkRecord]]] = {}

    def take(self, block: bytes, first: str) -> None:
        """Read a block whose hash was compared and whose first line has the name `first`."""
        for line in _lines(block, self._where):
            name = _name(line, self._last, first)
            first, self._last = "", name
            info = self._info(line, name)
            known, records = self.found.setdefault(name, (info, []))
            if known != info:
                line.fail(f"{name!r} is described twice, differently")
            records.extend(self._chunk(item, info, line) for item in line.items("chunks", max_items=4096))

    def _info(self, line: Fields, name: str) -> TensorInfo:
        dtype, shape = line.text("dtype"), line.get("shape")
        if dtype not in ITEM_BYTES:
            line.fail(f"{name!r} has the unknown dtype {dtype[:40]!r}")
        if (
            not is_numbers(shape, MAX_DIMS)
            or math.prod(max(n, 1) for n in shape) * ITEM_BYTES[dtype] > MAX_TENSOR_BYTES
        ):
            line.fail(f"{name!r} has the impossible shape {str(shape)[:80]}")
        return TensorInfo(name=name, dtype=dtype, shape=tuple(shape))

    def _chunk(self, item: object, info: TensorInfo, line: Fields) -> ChunkRecord:
        if not isinstance(item, list) or len(item) != 8:
            line.fail(f"a chunk of {info.name!r} has not 8 fields: {str(item)[:80]}")
        start, shape, part, offset, stored_bytes, codec, *hashes = item
        dims = len(info.shape)
        boxed = is_numbers(start, dims) and is_numbers(shape, dims) and len(start) == len(shape) == dims
        if not boxed or not is_numbers([part, offset, stored_bytes], 3):
            line.fail(f"a chunk of {info.name!r} has fields of the wrong type: {str(item)[:80]}")
        box = Box(tuple(start), tuple(shape))
        raw_bytes = math.prod(shape) * info.item_bytes
        if not box.inside(info.shape) or not 0 < raw_bytes <= MAX_CHUNK_BYTES:
            line.fail(
                f"chunk {box} of {info.name!r} is not inside {info.shape}, or not of 1 to {MAX_CHUNK_BYTES} bytes"
            )
        if part >= len(self._ref.parts) or offset + stored_bytes > self._ref.parts[part].size:
            line.fail(f"chunk {box} of {info.name!r} lies outside of part {part}: {stored_bytes} bytes at {offset}")
        if stored_bytes > raw_bytes or not isinstance(codec, str) or len(codec) > 16:
            line.fail(f"chunk {box} of {info.name!r}: {stored_bytes} bytes stored for {raw_bytes}, {str(codec)[:40]!r}")
        if not all(isinstance(text, str) and HASH_HEX.fullmatch(text) for text in hashes):
            line.fail(f"chunk {box} of {info.name!r} has no hashes: {str(hashes)[:80]}")
        return ChunkRecord(
            box=box,
            writer=self._ref.writer,
            part=part,
            offset=offset,
            stored_bytes=stored_bytes,
            raw_bytes=raw_bytes,
            codec=codec,
            raw_hash=bytes.fromhex(hashes[0]),
            stored_hash=bytes.fromhex(hashes[1]),
        )


class ValueReader:
    """Takes the lines of one index's value blocks in order, and puts long values together again."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._last = ("", -2)  # name and rank of the line before
        self._due = (0, 0)  # piece that must follow, of how many; equal when the value is whole
        self._found: dict[tuple[str, int | None], list[str]] = {}

    def take(self, block: bytes, first: str) -> None:
        """Read a block whose hash was compared and whose first line has the name `first`."""
        for line in _lines(block, self._where):
            name = _name(line, self._last[0], first)
            first = ""
            rank = None if line.get("rank") is None else line.integer("rank", high=MAX_RANK)
            place = (name, -1 if rank is None else rank)
            pieces = line.integer("pieces", low=1)
            piece = line.integer("piece", high=pieces - 1)
            whole = self._due[0] == self._due[1]
            if not (
                whole and place > self._last if piece == 0 else place == self._last and (piece, pieces) == self._due
            ):
                line.fail(f"piece {piece} of {pieces} of value {name!r} follows {self._last[0]!r}, piece {self._due}")
            self._last, self._due = place, (piece + 1, pieces)
            self._found.setdefault((name, rank), []).append(line.text("value", max_chars=MAX_LINE_CHARS))

    def values(self) -> dict[tuple[str, int | None], bytes]:
        """All values, whole. Raises CheckpointDamaged if the last one is not."""
        if self._due[0] != self._due[1]:
            Fields({}, self._where).fail(f"value {self._last[0]!r} ends after piece {self._due}")
        return {place: "".join(texts).encode("utf-8") for place, texts in self._found.items()}


def _lines(block: bytes, where: str) -> Iterator[Fields]:
    if not block.endswith(b"\n"):
        Fields({}, where).fail("a block does not end with a whole line")
    for text in block[:-1].split(b"\n"):
        yield Fields(load(text, where), where)


def _name(line: Fields, last: str, first: str) -> str:
    name = line.text("name", max_chars=MAX_NAME_BYTES)
    if not name or name < last or (first and name != first):
        line.fail(f"line {name[:80]!r} is out of order, after {last[:80]!r}")
    return name
