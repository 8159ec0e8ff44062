"""Containers, objects and values of one rank become named items, and come back exactly."""

from __future__ import annotations

import math
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from resilient import PerRank
from resilient.checkpoint.state import flatten, prepare
from resilient.errors import DtypeUnknown, StateInvalid
from tests.resilient.checkpoint.memory import bits, names, restore, save


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
