"""The one copy that the loop pays for: live tensors into a buffer that outlives the process.

On CPU it is made in the foreground, with the threads that torch has: a copy beside a running step slows that step by
more than it takes. From an accelerator it goes through a side stream, and this function waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from resilient.checkpoint.items import Shard, Slot
from resilient.checkpoint.tensors import LocalTensor
from resilient.errors import ShardInvalid

PAGE_BYTES, LINE_BYTES = 4096, 64
_BIG_BYTES = 16 * PAGE_BYTES


def layout_slots(shards: Iterable[Shard]) -> tuple[tuple[Slot, ...], int]:
    """Places for the shards, in their order, and the bytes of a buffer that holds them.

    Shards of 64 KiB and more begin on a page, smaller ones on a cache line.
    """
    slots, end = [], 0
    for shard in shards:
        align = PAGE_BYTES if shard.nbytes >= _BIG_BYTES else LINE_BYTES
        offset = -(-end // align) * align
        slots.append(Slot(shard=shard, offset=offset))
        end = offset + shard.nbytes
    return tuple(slots), end


def copy_into(arena: memoryview, slots: Sequence[Slot], tensors: Sequence[LocalTensor]) -> None:
    """Copy what the slots ask for out of the live tensors; when this returns, `arena` no longer changes with them.

    A slot's box may be a part of the tensor that holds it. Raises ShardInvalid if no live tensor holds it, or if it
    does not fit the buffer. Nothing refers to `arena` afterwards.
    """
    if not slots:
        return
    holders: dict[str, list[LocalTensor]] = {}
    for item in tensors:
        holders.setdefault(item.shard.tensor.name, []).append(item)
    memory = torch.frombuffer(arena, dtype=torch.uint8)
    sources: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for slot in slots:
        if slot.shard.nbytes:
            sources.append(_source(slot.shard, holders))
            targets.append(_target(memory, slot, sources[-1].dtype))
    with torch.no_grad():
        _copy(targets, sources)


def _source(shard: Shard, holders: dict[str, list[LocalTensor]]) -> torch.Tensor:
    for item in holders.get(shard.tensor.name, ()):
        held = item.shard
        if held.tensor == shard.tensor and held.box.overlap(shard.box) == shard.box:
            return item.tensor[shard.box.relative_to(held.box).slices()] if shard.box != held.box else item.tensor
    raise ShardInvalid(f"no live tensor holds {shard.box}", where=shard.tensor.name)


def _target(memory: torch.Tensor, slot: Slot, dtype: torch.dtype) -> torch.Tensor:
    end = slot.offset + slot.shard.nbytes
    if slot.offset % LINE_BYTES or end > memory.numel():
        raise ShardInvalid(
            f"bytes {slot.offset} to {end} are not an aligned part of a buffer of {memory.numel()} bytes",
            where=slot.shard.tensor.name,
        )
    return memory[slot.offset : end].view(dtype).view(slot.shard.box.shape)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        into, out_of = groups.setdefault((source.device, source.dtype), ([], []))
        into.append(target)
        out_of.append(source)
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for (device, _), (into, out_of) in groups.items():
        if device.type != "cuda":
            torch._foreach_copy_(into, out_of)
            continue
        stream = streams.get(device)
        if stream is None:
            stream = streams[device] = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for target, source in zip(into, out_of, strict=True):
                # Asynchronous where the buffer is registered with CUDA, else as slow as pageable memory is.
                target.copy_(source, non_blocking=True)
    for stream in streams.values():
        stream.synchronize()
