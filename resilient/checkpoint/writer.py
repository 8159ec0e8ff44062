"""Writing a checkpoint: sealed snapshots -> chunks -> parts, index, and at the end the manifest (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import xxhash

from resilient.checkpoint.codec import PLANES, RAW, Piece, check_codec, encode
from resilient.checkpoint.document import digest
from resilient.checkpoint.format import IndexRef, Manifest, PartRef, encode_manifest, index_key, part_key
from resilient.checkpoint.geometry import Box, split
from resilient.checkpoint.index import build_index
from resilient.checkpoint.items import Slot, TensorInfo
from resilient.checkpoint.lines import check_name
from resilient.checkpoint.parallel import Lease, Pools, Rooms, in_order
from resilient.checkpoint.stored import ChunkRecord
from resilient.errors import SaveCancelled, StateInvalid
from resilient.log.entries import Ref
from storage.failpoint import failpoint
from storage.store import Store

CHUNK_BYTES = 4 << 20
"""Raw bytes of a chunk at most: large enough for the codec and for one request, small enough to share out."""
PART_BYTES = 64 << 20
MIN_PART_BYTES = 8 << 20
PUTS_IN_FLIGHT = 2
MIN_ROOM_BYTES = 256 << 10  # a smaller chunk is encoded into memory of its own


@dataclass(frozen=True, kw_only=True)
class WriteJob:
    """What one writer puts down of one save."""

    prefix: str  # data/<generation>/<step>/<nonce>
    writer: str  # "n00003"
    snapshots: Sequence[tuple[memoryview, Sequence[Slot]]]  # a sealed buffer and what lies where in it
    values: Sequence[tuple[str, int | None, bytes]] = ()  # name, rank or None, encoded
    codec: str = "auto"


@dataclass(frozen=True, slots=True)
class _Chunk:
    info: TensorInfo
    box: Box
    raw: memoryview


@dataclass(frozen=True, slots=True)
class _Encoded:
    chunk: _Chunk
    codec: str
    pieces: list[Piece]
    stored_bytes: int
    raw_hash: bytes
    stored_hash: bytes
    room: npt.NDArray[np.uint8] | None  # where the pieces lie, to be given back


@dataclass(slots=True)
class _Part:
    """A part that is being filled."""

    number: int
    pieces: list[Piece] = field(default_factory=list)
    rooms: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    size: int = 0


def rooms() -> Rooms:
    """Memory for encoded chunks; a process that saves often keeps it from save to save."""
    return Rooms(CHUNK_BYTES)


def persist(
    store: Store,
    job: WriteJob,
    *,
    threads: int,
    cancelled: Callable[[], bool] = lambda: False,
    niceness: Callable[[], int] = lambda: 0,
    memory: Rooms | None = None,
) -> IndexRef:
    """Hash, encode and write all that a job names; returns once all of it is durable.

    threads    that hash and encode, side by side; two more only wait for the store
    cancelled  asked before every chunk and every put
    niceness   asked before every chunk: at which priority its thread should run; a smaller answer than before takes
               effect for all chunks that were not yet begun
    memory     from `rooms()`; at most about three parts' worth is in use

    The raw hash of a chunk is taken from the snapshot itself, before anything is encoded. Nothing that it writes is
    visible to anyone until a manifest names it. Raises SaveCancelled, StateInvalid, StoreError (KeyExists: someone
    else used this nonce).
    """
    check_codec(job.codec)
    chunks = sorted(_chunks(job), key=lambda chunk: (chunk.info.name, chunk.box.start))
    values = _values(job)
    tensors: dict[str, tuple[TensorInfo, list[ChunkRecord]]] = {}
    for _, slots in job.snapshots:
        for slot in slots:
            check_name(slot.shard.tensor.name)
            _known(tensors, slot.shard.tensor)

    def stop_if_cancelled() -> None:
        if cancelled():
            raise SaveCancelled("the save was given up before its data were written", where=job.prefix)

    lease = Lease(memory or rooms())

    def encoded(chunk: _Chunk) -> _Encoded:
        stop_if_cancelled()
        return _encode(chunk, job.codec, lease)

    parts = _Parts(store, job, _part_bytes(chunks), lease, stop_if_cancelled)
    with lease, parts, Pools(max(1, threads), niceness) as pools:
        for item in in_order(pools, encoded, chunks, ahead=max(1, threads) + 2):
            part, offset = parts.add(item)
            tensors[item.chunk.info.name][1].append(_record(item, job.writer, part, offset))
        refs = parts.finish()
    stop_if_cancelled()
    return _put_index(store, job, tensors, values, refs)


def put_manifest(store: Store, manifest: Manifest) -> Ref:
    """Write the manifest, and the reference by which a commit names it. Raises CheckpointDamaged, StoreError."""
    data = encode_manifest(manifest)
    failpoint("manifest.before")
    store.put_if_absent(manifest.key, data)
    return Ref(key=manifest.key, hash=digest(data), size=len(data))


def _chunks(job: WriteJob) -> Iterator[_Chunk]:
    for buffer, slots in job.snapshots:
        flat = buffer.cast("B")
        for slot in slots:
            info, at = slot.shard.tensor, slot.offset
            if at < 0 or at + slot.shard.nbytes > flat.nbytes:
                raise StateInvalid(f"{slot.shard.nbytes} bytes at {at} of a snapshot of {flat.nbytes}", where=info.name)
            # Pieces follow one another in the box's C order, so each is one run of bytes.
            for box in split(slot.shard.box, CHUNK_BYTES // info.item_bytes):
                nbytes = box.size * info.item_bytes
                yield _Chunk(info, box, flat[at : at + nbytes])
                at += nbytes


def _values(job: WriteJob) -> dict[tuple[str, int | None], bytes]:
    values: dict[tuple[str, int | None], bytes] = {}
    for name, rank, data in job.values:
        if (name, rank) in values:
            raise StateInvalid(f"the value {name!r} of rank {rank} was handed over twice", where=job.prefix)
        values[name, rank] = data
    return values


def _known(tensors: dict[str, tuple[TensorInfo, list[ChunkRecord]]], info: TensorInfo) -> None:
    if tensors.setdefault(info.name, (info, []))[0] != info:
        raise StateInvalid(f"{info} is also {tensors[info.name][0]}", where=info.name)


def _part_bytes(chunks: Sequence[_Chunk]) -> int:
    """A few parts even of a small save, so that the first are written while the rest is encoded."""
    quarter = sum(chunk.raw.nbytes for chunk in chunks) // 4
    return min(PART_BYTES, max(MIN_PART_BYTES, quarter))


def _encode(chunk: _Chunk, codec: str, memory: Lease) -> _Encoded:
    raw_hash = xxhash.xxh3_128_digest(chunk.raw)
    room = memory.borrow() if codec != "raw" and chunk.raw.nbytes >= MIN_ROOM_BYTES else None
    form, pieces = encode(chunk.raw, chunk.info.dtype, codec, room)
    stored_bytes = sum(map(len, pieces))
    if room is not None and (form != PLANES or stored_bytes < CHUNK_BYTES // 2):
        # A part may hold many chunks that became small; their rooms would add up to much more than the part.
        pieces = pieces if form != PLANES else [b"".join(pieces)]
        memory.give_back([room])
        room = None
    if form == RAW:
        return _Encoded(chunk, form, pieces, stored_bytes, raw_hash, raw_hash, None)
    stored = xxhash.xxh3_128()
    for piece in pieces:
        stored.update(piece)
    return _Encoded(chunk, form, pieces, stored_bytes, raw_hash, stored.digest(), room)


def _record(item: _Encoded, writer: str, part: int, offset: int) -> ChunkRecord:
    return ChunkRecord(
        box=item.chunk.box,
        writer=writer,
        part=part,
        offset=offset,
        stored_bytes=item.stored_bytes,
        raw_bytes=item.chunk.raw.nbytes,
        codec=item.codec,
        raw_hash=item.raw_hash,
        stored_hash=item.stored_hash,
    )


class _Parts:
    """Fills parts one after the other, and puts full ones in the background, a few at a time."""

    def __init__(
        self, store: Store, job: WriteJob, part_bytes: int, memory: Lease, stop_if_cancelled: Callable[[], None]
    ) -> None:
        self._store, self._job, self._part_bytes, self._memory = store, job, part_bytes, memory
        self._stop_if_cancelled = stop_if_cancelled
        self._pool = ThreadPoolExecutor(PUTS_IN_FLIGHT, thread_name_prefix="put")
        self._filling = _Part(0)
        self._puts: list[Future[PartRef]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, item: _Encoded) -> tuple[int, int]:
        """Append an encoded chunk: the number of the part, and the offset in it."""
        if self._filling.size and self._filling.size + item.stored_bytes > self._part_bytes:
            self._put()
        part = self._filling
        offset = part.size
        part.pieces.extend(item.pieces)
        part.size += item.stored_bytes
        if item.room is not None:
            part.rooms.append(item.room)
        return part.number, offset

    def finish(self) -> tuple[PartRef, ...]:
        """Put the last part; all of them, once durable."""
        if self._filling.size:
            self._put()
        return tuple(put.result() for put in self._puts)

    def _put(self) -> None:
        part, self._filling = self._filling, _Part(self._filling.number + 1)
        if len(self._puts) >= PUTS_IN_FLIGHT:
            self._puts[-PUTS_IN_FLIGHT].result()
        self._puts.append(self._pool.submit(self._store_part, part))

    def _store_part(self, part: _Part) -> PartRef:
        self._stop_if_cancelled()
        failpoint("writer.part")
        key = part_key(self._job.prefix, self._job.writer, part.number)
        self._store.put_if_absent(key, part.pieces)
        self._memory.give_back(part.rooms)
        part.pieces.clear()
        return PartRef(key=key, size=part.size)


def _put_index(
    store: Store,
    job: WriteJob,
    tensors: dict[str, tuple[TensorInfo, list[ChunkRecord]]],
    values: dict[tuple[str, int | None], bytes],
    parts: tuple[PartRef, ...],
) -> IndexRef:
    built = build_index(job.writer, tensors, values)
    records = [record for _, held in tensors.values() for record in held]
    failpoint("writer.index")
    store.put_if_absent(index_key(job.prefix, job.writer), built.data)
    return IndexRef(
        writer=job.writer,
        key=index_key(job.prefix, job.writer),
        size=len(built.data),
        tail_bytes=built.tail_bytes,
        tail_hash=built.tail_hash,
        parts=parts,
        tensors=built.tensors,
        chunks=built.chunks,
        values=built.values,
        raw_bytes=sum(record.raw_bytes for record in records),
        stored_bytes=sum(record.stored_bytes for record in records),
    )
