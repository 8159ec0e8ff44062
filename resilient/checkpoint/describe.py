"""How ranks tell each other what they hold: a RankState as bytes (pure)."""

from __future__ import annotations

import json
from typing import Any

import zstandard

from resilient.checkpoint.geometry import Box
from resilient.checkpoint.items import RankState, Shard, TensorInfo, ValueInfo
from resilient.errors import WireError

MAX_BYTES = 1 << 30
"""Bound on a decoded description; a rank with a hundred thousand shards needs some ten megabytes."""


def encode_rank_state(state: RankState) -> bytes:
    """Compressed JSON; tensors that occur in several shards are written once."""
    tensors: dict[TensorInfo, int] = {}
    shards = [
        [tensors.setdefault(shard.tensor, len(tensors)), shard.box.start, shard.box.shape] for shard in state.shards
    ]
    value = {
        "rank": state.rank,
        "node": state.node,
        "tensors": [[t.name, t.dtype, t.shape] for t in tensors],
        "shards": shards,
        "values": [[v.name, v.digest, v.rank] for v in state.values],
    }
    return zstandard.ZstdCompressor(level=1).compress(json.dumps(value, separators=(",", ":")).encode())


def decode_rank_state(data: bytes) -> RankState:
    """The state that `encode_rank_state` wrote. Raises WireError when the bytes are not of that form."""
    try:
        value: dict[str, Any] = json.loads(zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES))
        tensors = [TensorInfo(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in value["tensors"]]
        return RankState(
            rank=value["rank"],
            node=value["node"],
            shards=tuple(
                Shard(tensor=tensors[index], box=Box(tuple(start), tuple(shape)))
                for index, start, shape in value["shards"]
            ),
            values=tuple(ValueInfo(name=name, digest=digest, rank=rank) for name, digest, rank in value["values"]),
        )
    except (ValueError, KeyError, TypeError, IndexError, zstandard.ZstdError) as error:
        raise WireError(f"a rank's description cannot be read: {error}", next="use one version on all ranks") from error
