"""Reading a writer's index from a store: its tail first, then the blocks that are needed, each verified."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from resilient.checkpoint.document import digest
from resilient.checkpoint.fetch import check, damage, place
from resilient.checkpoint.format import IndexRef
from resilient.checkpoint.index import MAX_TAIL_BYTES, Block, Directory, read_directory
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.lines import TensorReader, ValueReader
from resilient.checkpoint.stored import ChunkRecord
from resilient.errors import CheckpointDamaged
from storage.store import Store

WHOLE_BYTES = 1 << 20
"""An index up to this size is fetched in one read."""
MAX_READ_BYTES = 8 << 20
"""Neighbouring blocks are fetched together up to this size."""


class IndexFile:
    """One index in a store. Methods raise CheckpointDamaged (naming object and offset) and StoreError."""

    def __init__(self, store: Store, ref: IndexRef) -> None:
        self._store, self._ref = store, ref
        self._where = place(store, ref.key)
        self._data = b""  # of a small index, whole
        self._directory: Directory | None = None

    def directory(self) -> Directory:
        """What the tail says, verified by the manifest's hash."""
        if self._directory is None:
            ref = self._ref
            with damage(self._store, ref.key):
                if ref.tail_bytes > MAX_TAIL_BYTES:
                    raise CheckpointDamaged(f"a tail of {ref.tail_bytes} bytes, {MAX_TAIL_BYTES} are allowed")
                self._check_size()
                tail = self._bytes(ref.size - ref.tail_bytes, ref.tail_bytes)
                check(tail, ref.tail_hash, f"the tail of the index ({len(tail)} bytes at {ref.size - len(tail)})")
                self._directory = read_directory(tail, ref, self._where)
        return self._directory

    def tensors(self, names: Collection[str] | None = None) -> dict[str, tuple[TensorInfo, list[ChunkRecord]]]:
        """The tensors that have a line here, or those of them that are in `names`."""
        reader = TensorReader(self._ref, self._where)
        with damage(self._store, self._ref.key):
            for block, data in self._blocks(self.directory().blocks_with(names)):
                reader.take(data, block.first)
            if names is not None:
                return {name: found for name, found in reader.found.items() if name in names}
            found = reader.found.values()
            self._count("tensors", len(found), self._ref.tensors)
            self._count("chunks", sum(len(records) for _, records in found), self._ref.chunks)
            raw = sum(record.raw_bytes for _, records in found for record in records)
            stored = sum(record.stored_bytes for _, records in found for record in records)
            self._count("raw bytes", raw, self._ref.raw_bytes)
            self._count("stored bytes", stored, self._ref.stored_bytes)
        return reader.found

    def values(self) -> dict[tuple[str, int | None], bytes]:
        """The values that this writer wrote."""
        reader = ValueReader(self._where)
        with damage(self._store, self._ref.key):
            for block, data in self._blocks(self.directory().value_blocks):
                reader.take(data, block.first)
            values = reader.values()
            self._count("values", len(values), self._ref.values)
        return values

    def _count(self, what: str, actual: int, expected: int) -> None:
        if actual != expected:
            raise CheckpointDamaged(f"the index holds {actual} {what}, the manifest says {expected}")

    def _check_size(self) -> None:
        size = self._ref.size
        if size <= WHOLE_BYTES:
            self._data = self._store.get(self._ref.key, max_bytes=size)
            actual = len(self._data)
        else:
            actual = self._store.size(self._ref.key)
        if actual != size:
            raise CheckpointDamaged(f"the index has {actual} bytes instead of {size}")

    def _bytes(self, start: int, length: int) -> bytes:
        if self._data:
            return self._data[start : start + length]
        return self._store.get_range(self._ref.key, start, length)

    def _blocks(self, blocks: Iterable[Block]) -> Iterator[tuple[Block, bytes]]:
        for group in _neighbours(blocks):
            start = group[0].offset
            data = self._bytes(start, group[-1].offset + group[-1].size - start)
            for block in group:
                one = data[block.offset - start : block.offset - start + block.size]
                actual = digest(one)
                if actual != block.hash:
                    raise CheckpointDamaged(
                        f"the block of {block.size} bytes at {block.offset} hashes to {actual} instead of {block.hash}"
                    )
                yield block, one


def _neighbours(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    group: list[Block] = []
    for block in blocks:
        if group and (
            block.offset != group[-1].offset + group[-1].size
            or block.offset + block.size - group[0].offset > MAX_READ_BYTES
        ):
            yield group
            group = []
        group.append(block)
    if group:
        yield group
