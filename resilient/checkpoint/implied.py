"""What every checkpoint holds beside the user's state: random number generators and the placement of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import xxhash

from resilient.checkpoint import rng, values
from resilient.checkpoint.state import flatten

RNG = "@rng"
PLACEMENT = "@placement"
"""Names that begin with `@` are ours; no entry of a user's state may."""

Stored = Mapping[tuple[str, int | None], bytes]


@dataclass(frozen=True, kw_only=True)
class Implied:
    """The implied values of one checkpoint, as one rank needs them."""

    rng_own: bytes | None  # saved by the rank of the same number
    rng_first: bytes | None  # saved by rank 0: what another layout derives from
    placement: bytes | None
    others: Stored  # the user's values

    @staticmethod
    def of(stored: Stored, rank: int) -> Implied:
        """Pick out of all values of a checkpoint."""
        return Implied(
            rng_own=stored.get((RNG, rank)),
            rng_first=stored.get((RNG, 0)),
            placement=stored.get((PLACEMENT, rank)),
            others={key: value for key, value in stored.items() if not key[0].startswith("@")},
        )


def capture_rng() -> bytes:
    """The random number generators of this process at this moment, encoded."""
    return values.encode(rng.capture())


def placement(state: Mapping[str, object]) -> bytes:
    """A digest of which boxes of the model this rank holds, encoded; it changes with the layout only."""
    return values.encode(_placement(state))


def same_layout(implied: Implied, saved_world_size: int, state: Mapping[str, object], world_size: int) -> bool:
    """Whether this rank holds the boxes of the model that the rank of its number held when it was saved.

    Only if that is so on every rank is the layout the same, and random numbers go on bit for bit.
    """
    if implied.placement is None or saved_world_size != world_size:
        return False
    return bool(values.decode(implied.placement) == _placement(state))


def restore_implied(implied: Implied, *, step: int, rank: int, same_layout: bool) -> None:
    """Put the random number generators where they were (same layout), or where `rng.derive` says (another)."""
    if same_layout and implied.rng_own is not None:
        rng.restore(values.decode(implied.rng_own))
    elif implied.rng_first is not None:
        rng.restore(rng.derive(values.decode(implied.rng_first), step=step, rank=rank))


def _placement(state: Mapping[str, object]) -> str:
    # Optimizer state does not exist before it is restored, so modules alone decide; with none, everything does.
    modules = {key: value for key, value in state.items() if isinstance(value, torch.nn.Module)}
    described = flatten(modules or state)
    boxes = sorted((t.shard.tensor.name, t.shard.box.start, t.shard.box.shape) for t in described.tensors)
    return xxhash.xxh3_128_hexdigest(json.dumps(boxes).encode())
