"""The snapshot: where each shard lies in a buffer, and the one copy that the loop pays for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilient.checkpoint.items import Shard, Slot
from resilient.checkpoint.tensors import LocalTensor
from resilient.errors import ShardInvalid

_PAGE_BYTES, _LINE_BYTES = 4096, 64


def layout_slots(shards: Sequence[Shard]) -> tuple[list[Slot], int]:
    """Slots for the shards, in their order, and the bytes that the buffer needs.

    Shards of a page or more begin on a page, smaller ones on a cache line.
    """
    slots, end = [], 0
    for shard in shards:
        align = _PAGE_BYTES if shard.nbytes >= _PAGE_BYTES else _LINE_BYTES
        start = -(-end // align) * align
        slots.append(Slot(shard=shard, offset=start))
        end = start + shard.nbytes
    return slots, end


def copy_into(buffer: memoryview, slots: Sequence[Slot], tensors: Sequence[LocalTensor]) -> None:
    """Copy what the slots say out of live tensors, which may change as soon as this returns.

    On CPU the copy is made here and now, with all threads: a copy in the background slows a training step more than
    it saves. Device tensors are copied on their current stream and waited for. A slot may be a part of a tensor's box
    (replicas share their bytes out). Raises ShardInvalid for a slot that no tensor holds.
    """
    held: dict[str, list[LocalTensor]] = {}
    for item in tensors:
        held.setdefault(item.shard.tensor.name, []).append(item)
    targets, sources = [], []
    for slot in slots:
        if slot.shard.nbytes == 0:
            continue
        source = _part_of(held.get(slot.shard.tensor.name, ()), slot.shard)
        space = torch.frombuffer(buffer, dtype=torch.uint8, count=slot.shard.nbytes, offset=slot.offset)
        targets.append(space.view(source.dtype).view(slot.shard.box.shape))
        sources.append(source)
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, sources)
        if any(source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()


def _part_of(items: Sequence[LocalTensor], shard: Shard) -> torch.Tensor:
    wanted = shard.box
    for item in items:
        box = item.shard.box
        starts = [a - b for a, b in zip(wanted.start, box.start, strict=True)]
        if all(s >= 0 and s + n <= have for s, n, have in zip(starts, wanted.shape, box.shape, strict=True)):
            return item.tensor[tuple(slice(s, s + n) for s, n in zip(starts, wanted.shape, strict=True))]
    raise ShardInvalid(f"no tensor of this rank holds {wanted}", where=shard.tensor.name)
