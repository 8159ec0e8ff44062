"""A state that is not the checkpoint's is refused untouched, or takes what fits and says what was left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resilient.errors import StateMismatch
from tests.resilient.checkpoint.memory import Memory, bits, restore, save


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
