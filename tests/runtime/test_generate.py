"""Text drawn from a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.config import OutputConfig
from runtime.generate import write_text
from runtime.layout import Layout
from runtime.mesh import Mesh


class Counting(nn.Module):
    """Sure that the byte after n is n + 1; remembers how far it was shown back."""

    longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return nn.functional.one_hot((tokens + 1) % 256, 256).float() * 100


def test_text_goes_on_from_the_prompt_and_looks_back_no_further_than_the_window() -> None:
    model, mesh = Counting(), Mesh(layout=Layout(), device=torch.device("cpu"))
    for temperature in (0.0, 0.7):
        config = OutputConfig(prompt="abc", text_bytes=4, temperature=temperature)
        assert write_text(model, config, mesh, window=5, seed=0) == "abcdefg"
    assert model.longest == 5


def test_control_characters_never_reach_the_terminal() -> None:
    config = OutputConfig(prompt="\x19", text_bytes=3)
    mesh = Mesh(layout=Layout(), device=torch.device("cpu"))
    assert write_text(Counting(), config, mesh, window=5, seed=0) == "\ufffd" * 4
