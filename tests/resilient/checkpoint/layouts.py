"""Random tensors laid out on random meshes, as hypothesis strategies (used by the tests of planning)."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import strategies as st

from resilient.checkpoint.geometry import Box, split
from resilient.checkpoint.items import RankState, Shard, TensorInfo
from resilient.checkpoint.stored import ChunkRecord, StoredTensor

HASH = bytes(16)
UINT = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}


def box_on_mesh(shape, sizes, at, placements, order):
    """The box of one rank: `placements` per mesh axis (a dim, or None for replicate), applied in `order` of the axes.

    torch's rule: ceil-sized pieces, the last ones short or empty. Applying the axes in another order than the mesh's
    is what _StridedShard describes (TP first, then FSDP on the same dim).
    """
    start, lengths = [0] * len(shape), list(shape)
    for axis in order:
        dim = placements[axis]
        if dim is None:
            continue
        piece = -(-lengths[dim] // sizes[axis])
        low = min(piece * at[axis], lengths[dim])
        start[dim], lengths[dim] = start[dim] + low, min(piece, lengths[dim] - low)
    return Box(tuple(start), tuple(lengths))


@st.composite
def meshes(draw, max_ranks=12):
    """Sizes of one to three mesh axes."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    return sizes if math.prod(sizes) <= max_ranks else [2, 3]


@st.composite
def infos(draw, max_size=9, max_tensors=4):
    """Tensors of nought to three dims, also without elements."""
    shapes = draw(st.lists(st.lists(st.integers(0, max_size), max_size=3), min_size=1, max_size=max_tensors))
    dtypes = st.sampled_from(["float32", "bfloat16", "uint8", "float64"])
    return [TensorInfo(name=f"t{i}", dtype=draw(dtypes), shape=tuple(shape)) for i, shape in enumerate(shapes)]


@st.composite
def laid_out(draw, tensors):
    """RankStates that hold these tensors on a random mesh, each tensor placed in its own way."""
    sizes = draw(meshes())
    boxes = []
    for info in tensors:
        dims = st.sampled_from([None, *range(len(info.shape))])
        placements = [draw(dims) for _ in sizes]
        boxes.append((placements, draw(st.permutations(range(len(sizes))))))
    return [
        RankState(
            rank=rank,
            node=rank // 4,
            shards=tuple(
                Shard(tensor=info, box=box_on_mesh(info.shape, sizes, at, placements, order))
                for info, (placements, order) in zip(tensors, boxes, strict=True)
            ),
        )
        for rank, at in enumerate(itertools.product(*map(range, sizes)))
    ]


def content(tensors, seed):
    """A random array of unsigned ints for each tensor."""
    random = np.random.default_rng(seed)
    return {t.name: random.integers(0, 200, t.shape).astype(UINT[t.item_bytes]) for t in tensors}


def write(shards_by_rank, arrays, random, *, max_elements=7):
    """What a keeper would store: (tensors by name, bytes of each part), with odd gaps between chunks."""
    parts, chunks, tensors = {}, {}, {}
    for rank, shards in enumerate(shards_by_rank):
        writer = f"n{rank // 4:05d}"
        for shard in shards:
            info = shard.tensor
            tensors[info.name] = info
            for box in split(shard.box, max_elements):
                part = random.randrange(2)
                data = parts.setdefault((writer, part), bytearray())
                data += bytes(random.choice((0, 0, 5, 90)))
                raw = np.ascontiguousarray(arrays[info.name][box.slices()]).tobytes()
                chunks.setdefault(info.name, []).append(record(box, len(raw), writer, part, len(data)))
                data += raw
    stored = {
        name: StoredTensor(info=info, chunks=tuple(random.sample(found := chunks.get(name, []), len(found))))
        for name, info in tensors.items()
    }
    return stored, parts


def record(box, nbytes, writer="n00000", part=0, offset=0):
    """A raw chunk's record."""
    return ChunkRecord(
        box=box, writer=writer, part=part, offset=offset, stored_bytes=nbytes, raw_bytes=nbytes,
        codec="raw", raw_hash=HASH, stored_hash=HASH,
    )  # fmt: skip


def execute(plan, parts):
    """Carry out a load plan: the wanted arrays, and how often each element was written."""
    out = [np.zeros(shard.box.shape, UINT[shard.tensor.item_bytes]) for shard in plan.wanted]
    times = [np.zeros(shard.box.shape, int) for shard in plan.wanted]
    for read in plan.reads:
        data = bytes(parts[read.writer, read.part][read.offset : read.offset + read.nbytes])
        assert len(data) == read.nbytes
        for use in read.uses:
            low = use.chunk.offset - read.offset
            raw = data[low : low + use.chunk.stored_bytes]
            array = np.frombuffer(raw, UINT[use.tensor.item_bytes]).reshape(use.chunk.box.shape)
            for copy in use.copies:
                out[copy.wanted][copy.dst.slices()] = array[copy.src.slices()]
                times[copy.wanted][copy.dst.slices()] += 1
    return out, times
