"""Digests of the whole tensors behind sharded state, to prove that what came back is what was there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class DigestProbe:
    """An entry of `state` that records, at each save, what every tensor was in the live ranks' memory.

    Its digests travel with the checkpoint; after a restore `saved` holds them, and `now()` says what is there.
    Gathering every tensor is slow: for proofs, not for production.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.saved: dict[str, str] = {}

    def now(self) -> dict[str, str]:
        """Hex xxh3_128 of each whole tensor's bytes, by name; the same on all ranks. Collective."""
        return {name: _digest(tensor) for name, tensor in _named(self._model, self._optimizer)}

    def state_dict(self) -> dict[str, str]:
        """The digests of this moment. Collective, as every save is."""
        return self.now()

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Keep what the saving ranks recorded."""
        self.saved = dict(saved)


def _named(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        short = name.removeprefix("module.")  # DDP's wrapper
        yield short, parameter
        for slot, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                yield f"{short}/{slot}", value


def _digest(tensor: Tensor) -> str:
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    data = whole.cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return xxhash.xxh3_128_hexdigest(data)
