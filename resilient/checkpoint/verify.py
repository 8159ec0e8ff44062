"""Verifying a checkpoint: everything that is damaged is found and named, not only the first thing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from resilient.checkpoint import values
from resilient.checkpoint.fetch import place
from resilient.checkpoint.format import PartRef
from resilient.checkpoint.geometry import missing, whole
from resilient.checkpoint.items import TensorInfo
from resilient.checkpoint.parallel import Scratch, run_all
from resilient.checkpoint.reader import Checkpoint, decode_chunk, open_checkpoint
from resilient.checkpoint.stored import ChunkRecord, StoredTensor
from resilient.errors import CheckpointDamaged, FormatUnsupported
from resilient.log.entries import Ref
from storage.errors import KeyMissing, RangeMissing
from storage.store import Store

T = TypeVar("T")
READ_BYTES = 32 << 20
Progress = Callable[[int], None]
"""Called with the stored bytes that were checked since the last call; from several threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it was written."""

    where: str  # the object
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def verify(
    store: Store, ref: Ref, *, deep: bool = False, threads: int = 2, progress: Progress | None = None
) -> tuple[Finding, ...]:
    """All that is wrong with the checkpoint under this manifest; () if it is whole.

    Manifest and indexes are read in full and compared with their hashes, parts are looked for and measured, tensors
    must be covered by disjoint chunks. `deep`: every chunk and every value is read, compared and decoded too.
    Raises StoreError when the store does not answer, so that nothing can be said.
    """
    findings: list[Finding] = []
    opened = _try(findings, lambda: open_checkpoint(store, ref))
    if opened is None:
        return tuple(findings)
    for writer in opened.manifest.writers:
        _try(findings, lambda writer=writer: opened.index(writer.writer).tensors())  # type: ignore[misc]
        held = _try(findings, lambda writer=writer: opened.index(writer.writer).values())  # type: ignore[misc]
        for (name, rank), data in (held or {}).items():
            where = f"{place(store, writer.key)} value {name!r} of rank {rank}"
            _try(findings, lambda data=data, where=where: values.decode(data, where=where))  # type: ignore[misc]
    gone = {part.key for part in _parts(opened) if not _measured(store, part, findings)}
    if findings:
        # The indexes that can be read are checked chunk by chunk all the same: a repair needs to know all of it.
        tensors = tuple(item for writer in opened.manifest.writers for item in _alone(opened, writer.writer))
    else:
        stored = _try(findings, opened.stored) or {}
        tensors = tuple((tensor.info, chunk) for tensor in stored.values() for chunk in tensor.chunks)
        for tensor in stored.values():
            _check_covered(tensor, place(store, ref.key), findings)
        _try(findings, opened.values)
    if deep:
        _verify_chunks(store, opened, tensors, gone, threads, progress, findings)
    return tuple(findings)


def _try(findings: list[Finding], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (CheckpointDamaged, FormatUnsupported) as error:
        finding = Finding(where=error.where, what=error.what)
        if finding not in findings:
            findings.append(finding)
        return None


def _parts(opened: Checkpoint) -> Iterator[PartRef]:
    return itertools.chain.from_iterable(writer.parts for writer in opened.manifest.writers)


def _measured(store: Store, part: PartRef, findings: list[Finding]) -> bool:
    """Whether the part is there and of the right size."""
    try:
        size = store.size(part.key)
    except KeyMissing:
        findings.append(Finding(where=place(store, part.key), what="the object is gone"))
        return False
    if size != part.size:
        findings.append(Finding(where=place(store, part.key), what=f"{size} bytes instead of {part.size}"))
    return size == part.size


def _alone(opened: Checkpoint, writer: str) -> Iterator[tuple[TensorInfo, ChunkRecord]]:
    try:
        found = opened.index(writer).tensors()
    except (CheckpointDamaged, FormatUnsupported):
        return  # found above
    for info, records in found.values():
        for record in records:
            yield info, record


def _check_covered(tensor: StoredTensor, where: str, findings: list[Finding]) -> None:
    if sum(chunk.box.size for chunk in tensor.chunks) == tensor.info.nbytes // tensor.info.item_bytes:
        return  # they are disjoint and inside: equal sizes prove it
    gaps = missing([chunk.box for chunk in tensor.chunks], whole(tensor.info.shape))
    findings.append(Finding(where=where, what=f"no chunk holds {gaps[0]} of {tensor.info.name!r}"))


def _verify_chunks(
    store: Store,
    opened: Checkpoint,
    chunks: Iterable[tuple[TensorInfo, ChunkRecord]],
    gone: set[str],
    threads: int,
    progress: Progress | None,
    findings: list[Finding],
) -> None:
    """Read, compare and decode every chunk; parts known to be gone or cut are left out."""
    by_part = sorted(
        ((opened.part(chunk).key, chunk, info) for info, chunk in chunks),
        key=lambda item: (item[0], item[1].offset),
    )

    def check(group: Sequence[tuple[str, ChunkRecord, TensorInfo]], scratch: Scratch) -> None:
        key, first, _ = group[0]
        last = max(chunk.offset + chunk.stored_bytes for _, chunk, _ in group)
        data = scratch.view("stored", last - first.offset)
        try:
            store.get_into(key, first.offset, data)
        except (KeyMissing, RangeMissing) as error:
            findings.append(Finding(where=place(store, key), what=error.what))
            return
        for _, chunk, info in group:
            at = chunk.offset - first.offset
            try:
                decode_chunk(data[at : at + chunk.stored_bytes], chunk, info, scratch)
            except CheckpointDamaged as error:
                findings.append(Finding(where=place(store, key), what=error.what))
        if progress is not None:
            progress(sum(chunk.stored_bytes for _, chunk, _ in group))

    run_all(check, _ranges([item for item in by_part if item[0] not in gone]), threads=threads)


def _ranges(
    items: Iterable[tuple[str, ChunkRecord, TensorInfo]],
) -> Iterator[list[tuple[str, ChunkRecord, TensorInfo]]]:
    """Chunks of one part whose range, from the first byte to the last, is one read."""
    group: list[tuple[str, ChunkRecord, TensorInfo]] = []
    for item in items:
        end = item[1].offset + item[1].stored_bytes
        if group and (group[0][0] != item[0] or end - group[0][1].offset > READ_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
