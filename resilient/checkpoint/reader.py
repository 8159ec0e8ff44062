"""Reading a checkpoint: from the manifest that the log names down to verified elements in place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from resilient.checkpoint.codec import RAW, decode
from resilient.checkpoint.fetch import NEXT, check, damage, fetch_whole, place
from resilient.checkpoint.format import MAX_MANIFEST_BYTES, IndexRef, Manifest, PartRef, decode_manifest
from resilient.checkpoint.geometry import Box, missing, whole
from resilient.checkpoint.index_file import IndexFile
from resilient.checkpoint.items import ITEM_BYTES, TensorInfo
from resilient.checkpoint.parallel import Scratch, run_all
from resilient.checkpoint.plan_load import ChunkUse, LoadPlan, PartRead
from resilient.checkpoint.stored import ChunkRecord, StoredTensor
from resilient.errors import CheckpointDamaged, ShardInvalid
from resilient.log.entries import Ref
from storage.store import Store

Values = dict[tuple[str, int | None], bytes]
Progress = Callable[[int], None]
"""Called with the raw bytes that were put in place since the last call; from several threads."""


def element_type(dtype: str) -> np.dtype[Any]:
    """The NumPy type of a tensor's elements as the reader moves them: bits, not numbers."""
    size = ITEM_BYTES[dtype]
    return np.dtype(f"u{size}" if size <= 8 else f"V{size}")


def open_checkpoint(store: Store, ref: Ref) -> Checkpoint:
    """The checkpoint whose manifest `ref` names. Raises CheckpointDamaged, FormatUnsupported, StoreError."""
    if ref.size > MAX_MANIFEST_BYTES:
        raise CheckpointDamaged(
            f"a manifest of {ref.size} bytes, {MAX_MANIFEST_BYTES} are allowed", where=place(store, ref.key), next=NEXT
        )
    data = fetch_whole(store, ref.key, ref.size, ref.hash, "the manifest")
    with damage(store, ref.key):
        manifest = decode_manifest(data, key=ref.key, where=place(store, ref.key))
    return Checkpoint(store, manifest)


class Checkpoint:
    """A checkpoint whose manifest was verified. Methods raise CheckpointDamaged for what is not as it was written."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.manifest = manifest
        self._store = store
        self._indexes = {ref.writer: IndexFile(store, ref) for ref in manifest.writers}
        self._refs = {ref.writer: ref for ref in manifest.writers}

    def index(self, writer: str) -> IndexFile:
        """One writer's index."""
        return self._indexes[writer]

    def ref(self, writer: str) -> IndexRef:
        """What the manifest says of one writer."""
        return self._refs[writer]

    def part(self, chunk: ChunkRecord | PartRead) -> PartRef:
        """The object that a chunk, or a read, lies in. Raises CheckpointDamaged for a part that no writer has."""
        ref = self._refs.get(chunk.writer)
        if ref is None or not 0 <= chunk.part < len(ref.parts):
            raise CheckpointDamaged(
                f"the manifest knows no part {chunk.part} of {chunk.writer!r}",
                where=place(self._store, self.manifest.key),
            )
        return ref.parts[chunk.part]

    def stored(self, names: Collection[str] | None = None) -> dict[str, StoredTensor]:
        """What is stored, by name, from all writers: everything, or what of `names` there is."""
        if names is None:
            return dict(self._all)
        return self._merge(frozenset(names))

    @cached_property
    def _all(self) -> dict[str, StoredTensor]:
        return self._merge(None)

    def _merge(self, names: frozenset[str] | None) -> dict[str, StoredTensor]:
        infos: dict[str, TensorInfo] = {}
        chunks: dict[str, list[ChunkRecord]] = {}
        for writer, index in self._indexes.items():
            where = place(self._store, self._refs[writer].key)
            for name, (info, records) in index.tensors(names).items():
                if infos.setdefault(name, info) != info:
                    raise CheckpointDamaged(
                        f"{name!r} is {info} here and {infos[name]} for another writer", where=where, next=NEXT
                    )
                chunks.setdefault(name, []).extend(records)
        merged = {name: StoredTensor(info=infos[name], chunks=tuple(chunks[name])) for name in sorted(infos)}
        for tensor in merged.values():
            _check_disjoint(tensor, place(self._store, self.manifest.key))
        return merged

    def values(self) -> Values:
        """The plain values, encoded, by name and rank (None: equal on all ranks)."""
        values: Values = {}
        for writer, index in self._indexes.items():
            for key, data in index.values().items():
                if key in values:
                    raise CheckpointDamaged(
                        f"value {key[0]!r} of rank {key[1]} has two writers",
                        where=place(self._store, self._refs[writer].key),
                        next=NEXT,
                    )
                values[key] = data
        return values

    def load(
        self,
        plan: LoadPlan,
        outputs: Sequence[npt.NDArray[Any]],
        *,
        threads: int,
        progress: Progress | None = None,
    ) -> None:
        """Read, verify and decode every chunk of the plan, and copy its elements into place.

        outputs  one writable array per wanted shard, C-contiguous, of the wanted box's shape and of
                 `element_type(dtype)`
        A chunk is copied only after its raw bytes were verified; when this raises CheckpointDamaged or StoreError,
        some outputs hold elements of this checkpoint already, and none holds anything unverified.
        """
        _check_outputs(plan, outputs)

        def read(item: PartRead, scratch: Scratch) -> None:
            self._read(item, outputs, scratch, progress)

        run_all(read, plan.reads, threads=threads)

    def _read(
        self, item: PartRead, outputs: Sequence[npt.NDArray[Any]], scratch: Scratch, progress: Progress | None
    ) -> None:
        part = self.part(item)
        fetched = scratch.view("stored", item.nbytes)
        with damage(self._store, part.key):
            if item.nbytes:
                self._store.get_into(part.key, item.offset, fetched)
            for use in item.uses:
                at = use.chunk.offset - item.offset
                stored = fetched[at : at + use.chunk.stored_bytes]
                raw = decode_chunk(stored, use.chunk, use.tensor, scratch)
                _copy(raw, use, outputs)
                if progress is not None:
                    progress(sum(copy.src.size for copy in use.copies) * use.tensor.item_bytes)


def decode_chunk(stored: memoryview, chunk: ChunkRecord, info: TensorInfo, scratch: Scratch) -> memoryview:
    """The raw bytes of a chunk, verified before and after decoding; a view of `stored`, or of `scratch`.

    Raises CheckpointDamaged (without a place).
    """
    what = f"the chunk {chunk.box} of {info.name!r} ({chunk.stored_bytes} bytes at {chunk.offset})"
    check(stored, chunk.stored_hash.hex(), what)
    if chunk.codec == RAW and chunk.raw_hash == chunk.stored_hash and chunk.raw_bytes == chunk.stored_bytes:
        return stored
    raw = scratch.view("raw", chunk.raw_bytes)
    try:
        decode(chunk.codec, stored, info.dtype, raw)
    except CheckpointDamaged as error:
        raise CheckpointDamaged(f"{what}: {error.what}") from error
    check(raw, chunk.raw_hash.hex(), f"{what}, decoded,")
    return raw


def _copy(raw: memoryview, use: ChunkUse, outputs: Sequence[npt.NDArray[Any]]) -> None:
    elements = np.frombuffer(raw, element_type(use.tensor.dtype)).reshape(use.chunk.box.shape)
    for copy in use.copies:
        outputs[copy.wanted][copy.dst.slices()] = elements[copy.src.slices()]


def _check_outputs(plan: LoadPlan, outputs: Sequence[npt.NDArray[Any]]) -> None:
    if len(outputs) != len(plan.wanted):
        raise ShardInvalid(f"{len(outputs)} outputs for {len(plan.wanted)} wanted shards")
    for shard, output in zip(plan.wanted, outputs, strict=True):
        expected = element_type(shard.tensor.dtype)
        if output.shape != shard.box.shape or output.dtype != expected or not output.flags.writeable:
            raise ShardInvalid(
                f"the output has shape {output.shape} and type {output.dtype} instead of {shard.box.shape}, {expected}",
                where=shard.tensor.name,
            )


def _check_disjoint(tensor: StoredTensor, where: str) -> None:
    """Raises CheckpointDamaged if two chunks share an element."""
    boxes = [chunk.box for chunk in tensor.chunks]
    if _in_a_row(boxes):
        return
    of = whole(tensor.info.shape)
    held = sum(box.size for box in boxes)
    if held > of.size or held + sum(gap.size for gap in missing(boxes, of)) > of.size:
        raise CheckpointDamaged(f"chunks of {tensor.info.name!r} overlap", where=where, next=NEXT)


def _in_a_row(boxes: Sequence[Box]) -> bool:
    """Whether each box begins, along dim 0, where the one before has ended: the common case, quickly seen."""
    if not boxes or not boxes[0].start:
        return len(boxes) <= 1
    return all(a.start[0] + a.shape[0] <= b.start[0] for a, b in itertools.pairwise(boxes))


def wanted_values(values: Mapping[tuple[str, int | None], bytes], rank: int) -> dict[str, bytes]:
    """The values that concern one rank: those equal on all ranks, and its own."""
    return {name: data for (name, of), data in values.items() if of is None or of == rank}
