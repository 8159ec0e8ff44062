"""Live state becomes named items, and comes back exactly."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader

from resilient import PerRank, trainable
from resilient.checkpoint.state import as_outputs, flatten, prepare
from resilient.errors import DtypeUnknown, StateInvalid, StateMismatch
from tests.resilient.checkpoint.memory import Memory, bits, restore, save, scramble


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


def names(state) -> list[str]:
    return sorted(item.shard.tensor.name for item in flatten(state).tensors)


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


# ---- containers, objects, tensors
def test_containers_are_restored_in_place_to_the_last_key_and_type():
    def build(x):
        return {
            "tree": {
                "tensors": [torch.full((2,), x), (torch.full((1,), x), "text")],
                "counts": Counter({3: int(x)}), 7: "seven", "seen": {1, int(x)}, "window": deque([x], maxlen=3),
                "by": defaultdict(list, {"a": [x]}), "array": np.full(3, x), "order": OrderedDict(a=x),
                "none": None, "long": [x] * int(x), "blob": bytearray(b"x" * int(x)),
            },
            "list": [1, [x]], "set": {int(x)}, "t": torch.full((2, 2), x), "counter": Counter(a=int(x)),
        }  # fmt: skip

    saved, live = build(5.0), build(2.0)
    live["tree"]["extra"] = "goes"
    inner = [live["tree"], live["tree"]["tensors"][0], live["tree"]["counts"], live["tree"]["window"], live["list"][1]]
    arrays = live["tree"]["array"]
    restore(save(saved), live)
    assert bits(live) == bits(saved)
    assert "extra" not in live["tree"]
    after = [live["tree"], live["tree"]["tensors"][0], live["tree"]["counts"], live["tree"]["window"], live["list"][1]]
    assert all(a is b for a, b in zip(inner, after, strict=True))
    assert live["tree"]["array"] is arrays
    assert live["tree"]["window"].maxlen == 3


def test_a_container_that_grew_comes_back_whole():
    live = {"history": {"losses": [], "best": None}}
    restore(save({"history": {"losses": [0.5, torch.ones(2)], "best": torch.zeros(1)}}), live)
    assert live["history"]["losses"][0] == 0.5
    assert torch.equal(live["history"]["losses"][1], torch.ones(2))
    assert torch.equal(live["history"]["best"], torch.zeros(1))


def test_modules_and_objects_inside_containers_have_entries_of_their_own():
    nets = {"actor": nn.Linear(2, 2), "critic": nn.Linear(2, 1), "epoch": 3}
    assert names({"nets": nets}) == [
        "nets/actor/bias", "nets/actor/weight", "nets/critic/bias", "nets/critic/weight",
    ]  # fmt: skip
    other = {"actor": nn.Linear(2, 2), "critic": nn.Linear(2, 1), "epoch": 0}
    actor = other["actor"]
    restore(save({"nets": nets}), {"nets": other})
    assert other["actor"] is actor
    assert other["epoch"] == 3
    assert bits({"nets": other}) == bits({"nets": nets})


class Average:
    """A user's Stateful, with tensors in its state."""

    def __init__(self, x):
        self.mean, self.n = torch.full((3,), x), int(x)

    def state_dict(self):
        return {"mean": self.mean, "n": self.n, ("key",): [math.nan]}

    def load_state_dict(self, state):
        self.mean, self.n = state["mean"], state["n"]


def test_stateful_objects_and_random_generators_come_back():
    def build(x):
        return {
            "average": Average(x), "torch": torch.Generator().manual_seed(int(x)), "python": random.Random(x),
            "numpy": np.random.default_rng(int(x)),
        }  # fmt: skip

    saved, live = build(4.0), build(1.0)
    saved["numpy"].normal(size=3)
    memory = save(saved)
    restore(memory, live)
    assert bits(live) == bits(saved)
    assert live["numpy"].random() == saved["numpy"].random()
    assert live["python"].random() == saved["python"].random()
    # The object owns what it was given: nothing in it is the saved object's.
    saved["average"].mean.add_(1)
    assert live["average"].mean.tolist() == [4.0] * 3


def test_an_objects_own_error_says_which_object_it_was():
    class Picky(Average):
        def load_state_dict(self, state):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        restore(save({"thing": Average(1.0)}), {"thing": Picky(1.0)})
    assert "'thing'" in caught.value.__notes__[0]


@pytest.mark.parametrize("value", [3, 2.5, "text", None, True, b"x", (1, 2), 1j], ids=repr)
def test_a_bare_value_is_refused_with_the_hint(value):
    with pytest.raises(StateInvalid, match=r"put it in a dict"):
        flatten({"epoch": value})
    with pytest.raises(StateInvalid, match=r"put it in a dict"):
        flatten({"epoch": PerRank(value)})


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"x": object()}, "state_dict and load_state_dict"),
        ({"x": DataLoader([1])}, "Sampler"),
        ({"x": {"y": [1, object()]}}, r"\['y'\]\[1\]"),
        ({"x": {"1": torch.zeros(1), 1: torch.zeros(1)}}, "two tensors"),
        ({"x": {"1": {"a": Average(1)}, 1: {"a": Average(1)}}}, "both named"),
        ({"x": {"y": PerRank([])}}, "top level"),
        ({"@rng": {}}, "'@'"),
        ({3: {}}, "strings"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"x": torch.zeros(2, device="meta")}, "meta"),
        ([nn.Linear(1, 1)], "not a dict"),
        ({"x": nn.Linear},  "state_dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_by_name(state, match):
    with pytest.raises(StateInvalid, match=match):
        flatten(state)


def test_a_dtype_that_checkpoints_do_not_hold_is_refused():
    with pytest.raises(DtypeUnknown, match="bits8"):
        flatten({"x": torch.zeros(2, dtype=torch.uint8).view(torch.bits8)})


def test_a_container_that_contains_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(StateInvalid, match="contain itself"):
        flatten({"x": loop})


def test_what_is_per_rank_is_kept_apart():
    flat = flatten({"data": PerRank({"position": 3, "t": torch.ones(2)}), "shared": {"a": 1}})
    assert [item.shard.tensor.name for item in flat.tensors] == ["data/t@0"]
    assert set(flat.values) == {"shared"}
    assert set(flat.rank_values) == {"data"}
    live = {"data": PerRank({"position": 0, "t": torch.zeros(2)}), "shared": {"a": 0}}
    saved = save({"data": PerRank({"position": 3, "t": torch.ones(2)}), "shared": {"a": 1}})
    restore(saved, live)
    assert live["data"].value["position"] == 3
    assert live["data"].value["t"].tolist() == [1, 1]


def test_a_rank_that_did_not_exist_keeps_its_own_and_says_so():
    saved = save({"data": PerRank({"position": 3})})
    live = {"data": PerRank({"position": 0})}
    report = prepare(live, saved.infos, saved.values, rank=5, same_layout=False)
    assert report.left_out == ("data: rank 5 did not exist when this was saved; left as it was made",)
    report.finish()
    assert live["data"].value == {"position": 0}


# ---- what does not fit
def test_missing_and_unexpected_names_are_an_error_that_names_them():
    saved = save({"model": nn.Sequential(nn.Linear(2, 2)), "old": {"a": 1}})
    with pytest.raises(StateMismatch, match=r"2 not in the checkpoint: .*model/1.bias.*1 only in .*: old"):
        restore(saved, {"model": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})


def test_not_strict_takes_what_fits_and_reports_exactly_the_rest():
    saved = save({"model": nn.Sequential(nn.Linear(2, 2)), "old": {"a": 1}})
    live = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    new, before = {"n": 1}, live[1].weight.clone()
    report = restore(saved, {"model": live, "new": new}, strict=False)
    assert report.left_out == (
        "model/1.weight: not in the checkpoint (a parameter or buffer)",
        "new: not in the checkpoint (a container)",
        "old: only in the checkpoint",
    )
    assert torch.equal(live[1].weight, before)
    assert new == {"n": 1}
    assert bits({"model": live[:1]}) == {k: v for k, v in bits_of(saved).items() if k.startswith("model")}


def bits_of(memory: Memory) -> dict[str, bytes]:
    return {name: memory.whole(name).tobytes() for name in memory.infos}


@pytest.mark.parametrize(
    ("live", "match"),
    [(torch.zeros(3), r"float32 \[2\].*float32 \[3\]"), (torch.zeros(2, dtype=torch.float64), "float64")],
)
def test_another_shape_or_dtype_is_always_an_error(live, match):
    with pytest.raises(StateMismatch, match=match):
        restore(save({"t": torch.zeros(2)}), {"t": live}, strict=False)


def test_nothing_is_touched_when_the_state_does_not_fit():
    live = {"a": {"n": 0}, "model": nn.Linear(2, 2), "z": torch.zeros(3)}
    saved = save({"a": {"n": 1}, "model": nn.Linear(2, 2), "z": torch.zeros(2)})
    before = bits(live)
    with pytest.raises(StateMismatch):
        restore(saved, live)
    assert bits(live) == before


@pytest.mark.parametrize(
    ("only", "restored"),
    [
        ("model", {"model/0.weight", "model/0.bias", "model/1.weight", "model/1.bias"}),
        (["model/0.*", "extra"], {"model/0.weight", "model/0.bias", "extra/t"}),
        ("*.bias", {"model/0.bias", "model/1.bias"}),
        ("extra/t", {"extra/t"}),
    ],
)
def test_only_restores_what_it_names(only, restored):
    def build(x):
        net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        nn.init.constant_(net[0].weight, x)
        return {"model": net, "extra": {"t": torch.full((1,), x), "n": x}}

    saved, live = build(1.0), build(2.0)
    report = restore(save(saved), live, only=only)
    assert {item.shard.tensor.name for item in report.wanted} == restored
    assert live["extra"]["n"] == (1.0 if "extra" in [*only] else 2.0)
    assert report.left_out == ()


def test_only_with_a_typing_error_restores_nothing_loudly():
    with pytest.raises(StateMismatch, match="its keys are model"):
        restore(save({"model": nn.Linear(1, 1)}), {"model": nn.Linear(1, 1)}, only="modle")


# ---- memory
@pytest.mark.parametrize(
    "dtype",
    ["float64", "bfloat16", "float8_e4m3fn", "complex64", "complex128", "int64", "uint16", "bool", "int8", "float16"],
)
@pytest.mark.parametrize("strided", [False, True])
def test_every_dtype_and_stride_comes_back_to_the_bit(dtype, strided):
    kind = getattr(torch, dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 255, (6, 4 * kind.itemsize), dtype=torch.uint8)
    a, b = raw.view(kind), torch.zeros_like(raw).view(kind)
    if strided:
        a, b = a.t(), b.t()
    live = {"t": b, "scalar": a[0, 0].clone().zero_(), "empty": b[:0]}
    saved = {"t": a, "scalar": a[0, 0].clone(), "empty": a[:0]}
    assert bits(live) != bits(saved)
    restore(save(saved), live)
    assert bits(live) == bits(saved)


def test_contiguous_cpu_tensors_are_written_in_place_and_others_bounced():
    a, b = torch.zeros(2, 3), torch.zeros(3, 2).t()
    report = prepare({"a": a, "b": b}, *_infos({"a": a, "b": b}))
    outputs = as_outputs(report.wanted)
    for array in outputs.arrays:
        array[:] = np.array(1.0, np.float32).view(np.uint32)
    assert a.sum() == 6
    assert b.sum() == 0
    outputs.finish()
    assert b.sum() == 6


def _infos(state):
    memory = save(state)
    return memory.infos, memory.values
