"""Llama: a decoder-only transformer with RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters carry Hugging Face's names (model.layers.0.self_attn.q_proj.weight). Shapes beside arguments: B samples,
T positions, D hidden, H query heads, K key/value heads, W head width.
Source: Llama 2 and 3 (arXiv:2307.09288, 2407.21783).
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from runtime.config import ModelConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean in float32 at least."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., size)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def rotary_table(positions: int, width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, W), float32; halves repeat, as Hugging Face's Llama has it."""
    frequency = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(positions, device=device, dtype=torch.float32)[:, None] * frequency
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, W) turned by its positions' angles; pairs are (i, i + W/2)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention; groups of query heads share one key/value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.groups = config.head_width, config.num_heads // config.num_kv_heads
        self.q_proj = nn.Linear(config.hidden_size, config.num_heads * self.width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_kv_heads * self.width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, D)."""
        query, key, value = (
            # Heads are counted from the projection's width, so that a slice of the heads works too.
            project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(query, cos, sin).to(value.dtype),
            rotate(key, cos, sin).to(value.dtype),
            value,
            is_causal=True,
            enable_gqa=self.groups > 1,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention, then SwiGLU, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout
        self.recompute = False  # keep only the input for backward

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, D)."""
        if self.recompute and torch.is_grad_enabled():
            # Inside forward, so that parameters gathered around it are there for both passes, and names stay.
            again: Tensor = checkpoint(self._blocks, x, cos, sin, use_reentrant=False)
            return again
        return self._blocks(x, cos, sin)

    def _blocks(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self._drop(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, training=self.training) if self.dropout else x


class Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Keyed by number: a part of the model that holds some of the layers keeps their names.
        self.layers = nn.ModuleDict({str(index): DecoderLayer(config) for index in range(config.num_layers)})
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> hidden (B, T, D)."""
        x = self.embed_tokens(tokens)
        # Made anew each time (a few KB): no buffer to shard, save or fill after the model was built without memory.
        cos, sin = rotary_table(tokens.shape[1], self.config.head_width, self.config.rope_theta, tokens.device)
        for layer in self.layers.values():
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """The language model: `forward` turns token ids (B, T) into logits (B, T, vocabulary)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # Tied: no second parameter at all, as in Hugging Face's files, so nothing can come untied.
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        hidden: Tensor = self.model(tokens)
        if self.lm_head is None:
            return F.linear(hidden, self.model.embed_tokens.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def decoder_layers(self) -> list[DecoderLayer]:
        """The units that sharding gathers one by one."""
        return [layer for layer in self.model.layers.values() if isinstance(layer, DecoderLayer)]


def count_parameters(config: ModelConfig) -> int:
    """Learned numbers of the model, counted without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter from a generator of its own, seeded by (seed, name): the same values in any layout.

    A sharded parameter is drawn whole, one at a time, and this rank's part is taken.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() == 1:
            local.fill_(1.0)
            continue
        std = config.init_std
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_layers)
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        whole = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        if isinstance(parameter, DTensor):
            sizes, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            whole = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
        local.copy_(whole)
