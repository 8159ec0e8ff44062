"""The model against a plain reference, its names, its initial weights."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.config import ModelConfig
from runtime.layout import Layout
from runtime.mesh import Mesh
from runtime.models.llama import Llama, count_parameters, initialise, rotary_table, rotate
from runtime.models.presets import PRESETS
from runtime.parallel.build import build_model
from runtime.settings import read_config

SMALL = ModelConfig(
    vocab_size=11, hidden_size=12, intermediate_size=20, num_layers=2, num_heads=6, num_kv_heads=2, tie_embeddings=False
)


def a_model(config: ModelConfig) -> Llama:
    model = Llama(config)
    initialise(model, config, seed=3)
    return model.double()


def reference_logits(weights: dict[str, torch.Tensor], tokens: list[int], config: ModelConfig) -> torch.Tensor:
    """The same function from the papers, position by position and head by head; float64."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / math.sqrt(float(x.detach().pow(2).mean()) + config.norm_eps) * weight

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        half, out = len(x) // 2, x.clone()
        for pair in range(half):
            angle = position * config.rope_theta ** (-2 * pair / len(x))
            a, b = x[pair], x[pair + half]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    width, group = config.head_width, config.num_heads // config.num_kv_heads
    stream = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        normed = [norm(x, own["input_layernorm.weight"]) for x in stream]
        q, k, v = ([own[f"self_attn.{n}_proj.weight"] @ x for x in normed] for n in "qkv")
        for here in range(len(tokens)):
            heads = []
            for head in range(config.num_heads):
                mine = slice(head * width, (head + 1) * width)
                shared = slice(head // group * width, (head // group + 1) * width)
                query = turn(q[here][mine], here)
                scores = torch.stack([query @ turn(k[j][shared], j) / math.sqrt(width) for j in range(here + 1)])
                heads.append(sum(p * v[j][shared] for j, p in enumerate(scores.softmax(0))))
            stream[here] = stream[here] + own["self_attn.o_proj.weight"] @ torch.cat(heads)
            y = norm(stream[here], own["post_attention_layernorm.weight"])
            gate = own["mlp.gate_proj.weight"] @ y
            inner = gate * gate.sigmoid() * (own["mlp.up_proj.weight"] @ y)
            stream[here] = stream[here] + own["mlp.down_proj.weight"] @ inner
    head_weight = weights["lm_head.weight"]
    return torch.stack([head_weight @ norm(x, weights["model.norm.weight"]) for x in stream])


def test_logits_equal_a_reference_written_out() -> None:
    model, tokens = a_model(SMALL), [3, 1, 4, 1, 5]
    expected = reference_logits(dict(model.state_dict()), tokens, SMALL)
    torch.testing.assert_close(model(torch.tensor([tokens]))[0], expected, rtol=1e-6, atol=1e-7)


def test_gradients_equal_finite_differences() -> None:
    model, tokens = a_model(SMALL), torch.tensor([[3, 1, 4, 1, 5, 9]])
    generator = torch.Generator().manual_seed(0)
    loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-5)
                values.append(float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])))
                parameter.sub_(direction, alpha=sign * 1e-5)
            slope = float((parameter.grad * direction).sum())
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_names_are_hugging_faces() -> None:
    names = set(Llama(SMALL).state_dict())
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    layer = {name for name in names if name.startswith("model.layers.1.")}
    assert layer == {
        f"model.layers.1.{part}.weight"
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    }
    assert "lm_head.weight" not in Llama(ModelConfig(**{**vars(SMALL), "tie_embeddings": True})).state_dict()


def test_a_rotated_product_depends_on_the_distance_only() -> None:
    cos, sin = rotary_table(9, 8, 100.0, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    turned = [[float(rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j])) for j in range(9)] for i in range(9)]
    assert turned[7][4] == pytest.approx(turned[4][1], abs=1e-5)
    assert turned[7][4] != pytest.approx(turned[7][5], abs=1e-5)


def test_a_weight_depends_on_seed_and_name_only() -> None:
    def weights(layers: int, seed: int) -> dict[str, torch.Tensor]:
        config = ModelConfig(**{**vars(SMALL), "num_layers": layers})
        mesh = Mesh(layout=Layout(), device=torch.device("cpu"))
        return dict(build_model(config, read_config("").parallel, mesh, seed).state_dict())

    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights(1, 7)[name], weights(2, 7)[name])
    assert not torch.equal(weights(1, 7)[name], weights(1, 8)[name])
    assert not torch.equal(weights(1, 7)[name], weights(1, 7)[name.replace("q_proj", "o_proj")])


def test_presets_have_their_published_sizes() -> None:
    assert count_parameters(read_config("[model]\npreset='llama3-8b'").model) == 8_030_261_248
    assert count_parameters(read_config("[model]\npreset='tiny'").model) < 1_000_000
    for name in PRESETS:
        assert count_parameters(read_config(f"[model]\npreset='{name}'").model) > 0
