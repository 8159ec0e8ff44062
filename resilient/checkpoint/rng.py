"""Random number generators of a process: Python's, NumPy's, torch's, CUDA's; taken, put back, derived anew."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
import xxhash

from resilient.errors import CheckpointDamaged

State = dict[str, Any]
_VERSION = 1


def capture() -> State:
    """The generators of this process as plain values; CUDA's only where CUDA is in use (current device)."""
    state: State = {"v": _VERSION, "python": random.getstate(), "torch": _bytes(torch.random.get_rng_state())}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
        state["numpy"] = (str(kind), keys.tobytes(), int(position), int(has_gauss), float(cached))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _bytes(torch.cuda.get_rng_state())
    return state


def restore(state: State) -> None:
    """Put the generators back where `capture` found them: what is drawn next is the same, bit for bit.

    Raises CheckpointDamaged where the value is not of that form.
    """
    try:
        if "derived" in state:
            _seed_all(int(state["derived"]))
            return
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        torch.random.set_rng_state(_tensor(state["torch"]))
        if "numpy" in state:
            import numpy as np

            kind, keys, position, has_gauss, cached = state["numpy"]
            np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), position, has_gauss, cached))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointDamaged(f"the saved random number generators cannot be used: {error}") from error


def derive(first: State, *, step: int, rank: int) -> State:
    """Generators for a rank of another layout than the one that saved; pass the result to `restore`.

    The seed is xxh3_64 of (rank 0's saved torch and Python generators, step, rank). So every rank of the new layout
    draws its own numbers, restoring the same step twice gives the same ones, and no two ranks or steps share any.
    What the ranks of the old layout would have drawn next is not continued: there is no such thing for another number.
    """
    text = repr((first.get("torch"), first.get("python"), step, rank)).encode()
    return {"v": _VERSION, "derived": xxhash.xxh3_64_intdigest(text) & ((1 << 63) - 1)}


def _seed_all(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)  # CUDA's too
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed & 0xFFFF_FFFF)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
