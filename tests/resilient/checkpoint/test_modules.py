"""Modules become named tensors, whatever wraps them, and come back into the very parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from resilient import trainable
from tests.resilient.checkpoint.memory import bits, names, restore, save, scramble


class Net(nn.Module):
    """Tied weights, a buffer that is saved, one that is not, a frozen parameter, a submodule called `module`."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.module(self.embed(tokens)))


NAMES = [
    "model/embed.weight", "model/frozen", "model/module.0.bias", "model/module.0.weight", "model/module.1.bias",
    "model/module.1.num_batches_tracked", "model/module.1.running_mean", "model/module.1.running_var",
    "model/module.1.weight",
]  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: net,
        lambda net: torch.compile(net),
        checkpoint_wrapper,
        lambda net: torch.compile(checkpoint_wrapper(net)),
        nn.DataParallel,
    ],
    ids=["plain", "compile", "activation checkpoint", "both", "DataParallel"],
)
def test_names_are_canonical_whatever_wraps_the_module(wrap):
    inner = Net()
    inner.module[0] = checkpoint_wrapper(inner.module[0])
    assert names({"model": wrap(inner)}) == NAMES


def test_a_wrapped_module_restores_into_a_plain_one_and_back():
    a, b = Net(), Net()
    a.module[0] = checkpoint_wrapper(a.module[0])
    wrapped = torch.compile(a)
    restore(save({"model": wrapped}), {"model": b})
    assert bits({"model": b}) == bits({"model": wrapped})
    scramble(b)
    restore(save({"model": b}), {"model": wrapped})
    assert bits({"model": b}) == bits({"model": wrapped})


def test_a_tied_weight_is_stored_once_and_its_other_name_points_at_it():
    memory = save({"model": Net()})
    assert "model/head.weight" not in memory.infos
    untied = Net(tied=False)
    restore(memory, {"model": untied})
    assert torch.equal(untied.head.weight, untied.embed.weight)
    assert untied.head.weight is not untied.embed.weight


def test_an_untied_checkpoint_restores_into_a_tied_module():
    untied, tied = Net(tied=False), Net()
    with torch.no_grad():
        untied.head.weight.copy_(untied.embed.weight)
    restore(save({"model": untied}), {"model": tied})
    assert torch.equal(tied.head.weight, untied.embed.weight)


def test_restoring_writes_into_the_very_parameters():
    net, saved = Net(), save({"model": Net()})
    before = [(p, p.data_ptr()) for p in net.parameters()]
    restore(saved, {"model": net})
    assert [(p, p.data_ptr()) for p in net.parameters()] == before


class Extra(nn.Linear):
    """Extra state, and a tensor in the state dict that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scale, self.calls = torch.zeros(3), {1: "one"}

    def get_extra_state(self):
        return {"calls": self.calls, "amax": self.scale * 2}

    def set_extra_state(self, state):
        self.calls, self.scale = state["calls"], state["amax"] / 2

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = self.weight.detach().to(torch.int8)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.loaded = state_dict.pop(prefix + "packed", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_extra_state_and_computed_entries_go_through_load_state_dict():
    a, b = Extra(), Extra()
    a.scale, a.calls = torch.tensor([1.0, 2.0, 3.0]), {5: "five"}
    restore(save({"m": nn.Sequential(a)}), {"m": nn.Sequential(b)})
    assert b.calls == {5: "five"}
    assert torch.equal(b.scale, a.scale)
    assert torch.equal(b.loaded, a.weight.detach().to(torch.int8))


def test_trainable_saves_what_learns_and_restores_from_a_whole_checkpoint_too():
    net = Net(tied=False)
    for parameter in (*net.embed.parameters(), *net.head.parameters()):
        parameter.requires_grad_(False)
    assert names({"model": trainable(net)}) == [name for name in NAMES if "module" in name]
    other = Net(tied=False)
    for parameter in (*other.embed.parameters(), *other.head.parameters()):
        parameter.requires_grad_(False)
    before = other.embed.weight.clone()
    restore(save({"model": net}), {"model": trainable(other)})
    assert torch.equal(other.module[0].weight, net.module[0].weight)
    assert torch.equal(other.embed.weight, before)
