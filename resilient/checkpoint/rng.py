"""Random number generators of this process: as a plain value, put back, and derived for another layout.

Same layout: every rank gets back what it saved, and the run goes on bit for bit. Another layout: there is no right
answer for a rank that did not exist, so all ranks derive fresh, distinct seeds from what rank 0 saved (see `derive`).
"""

from __future__ import annotations

import hashlib
import random
from array import array
from typing import Any

import numpy as np
import torch

from resilient.checkpoint import values
from resilient.errors import CheckpointDamaged


def capture() -> dict[str, Any]:
    """State of Python's, NumPy's legacy, torch's CPU and (once CUDA is in use) this device's generator."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": (version, array("I", words).tobytes(), gauss),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put the generators where `capture` or `derive` saw them. Raises CheckpointDamaged for anything else."""
    try:
        version, words, gauss = state["python"]
        python = (version, tuple(array("I", words)), gauss)
        random.Random().setstate(python)  # refuses what is no state before anything is changed
        torch.Generator().set_state(_tensor(state["torch"]))
        np.random.RandomState().set_state(state["numpy"])
        random.setstate(python)
        np.random.set_state(state["numpy"])
        torch.set_rng_state(_tensor(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(state["cuda"]))
        elif "cuda_seed" in state:
            torch.cuda.manual_seed(state["cuda_seed"])  # waits for CUDA to come into use, if it ever does
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointDamaged(f"the state of the random number generators cannot be used: {error}") from error


def derive(saved: dict[str, Any], *, step: int, rank: int) -> dict[str, Any]:
    """States for `rank` in a layout other than the saved one, from what rank 0 saved.

    Seeds are the first 8 bytes (little-endian) of SHA-256("resilient.rng" NUL generator NUL step NUL rank NUL value),
    numbers in decimal, value = `values.encode(saved)`, generator = python, numpy (its 8 bytes as two words), torch,
    cuda. So every layout that restores one checkpoint draws reproducible numbers, no two ranks the same ones.
    """
    encoded = values.encode(saved)

    def seed(generator: str) -> int:
        text = f"resilient.rng\0{generator}\0{step}\0{rank}\0".encode()
        return int.from_bytes(hashlib.sha256(text + encoded).digest()[:8], "little")

    version, words, gauss = random.Random(seed("python")).getstate()
    numpy_seed = seed("numpy")
    numpy = np.random.RandomState([numpy_seed & 0xFFFF_FFFF, numpy_seed >> 32])
    return {
        "python": (version, array("I", words).tobytes(), gauss),
        "numpy": numpy.get_state(legacy=False),
        "torch": torch.Generator().manual_seed(seed("torch")).get_state().numpy().tobytes(),
        "cuda_seed": seed("cuda"),
    }


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
