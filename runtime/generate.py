"""Text drawn from the trained model, so that one sees that it learned."""

from __future__ import annotations

import torch
from torch import nn

from runtime.config import OutputConfig
from runtime.mesh import Mesh
from runtime.parallel.shard import gather_for_good


@torch.no_grad()
def write_text(model: nn.Module, config: OutputConfig, mesh: Mesh, *, window: int, seed: int) -> str:
    """The prompt, continued by `config.text_bytes` bytes; the same on all ranks. Collective.

    At most `window` bytes are looked back at. Gathers the whole model on every rank: training ends here.
    """
    gather_for_good(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = list(config.prompt.encode())
    model.eval()
    for _ in range(config.text_bytes):
        logits = model(torch.tensor([tokens[-window:]], device=mesh.device))[0, -1].float().cpu()
        if config.temperature > 0:
            chances = (logits / config.temperature).softmax(-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        else:
            tokens.append(int(logits.argmax()))
    written = bytes(token for token in tokens if token < 256).decode(errors="replace")
    # An untrained model writes control characters, which a terminal would obey.
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in written)
