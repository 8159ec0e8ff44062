"""Learning rates over the steps; which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.config import ModelConfig, OptimizerConfig, ScheduleConfig
from runtime.models.llama import Llama
from runtime.optimizer import build_optimizer, build_scheduler, learning_rate


def test_the_cosine_rises_falls_and_stays() -> None:
    factor = learning_rate(ScheduleConfig(warmup_steps=4, floor=0.1), 25)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(14) == pytest.approx(0.55)  # half of the way
    assert factor(9) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(24) == pytest.approx(0.1)
    assert factor(1000) == pytest.approx(0.1)


def test_other_shapes() -> None:
    assert learning_rate(ScheduleConfig(shape="constant", warmup_steps=2), 10)(9) == 1.0
    linear = learning_rate(ScheduleConfig(shape="linear", warmup_steps=0, floor=0.0, decay_steps=11), 100)
    assert [linear(step) for step in (0, 5, 10, 50)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert learning_rate(ScheduleConfig(warmup_steps=5), 1)(0) == pytest.approx(0.2)


def test_the_scheduler_sets_the_rate_of_both_groups_and_saves_no_function() -> None:
    model = Llama(ModelConfig(hidden_size=8, num_heads=2, num_kv_heads=1, num_layers=1))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01), torch.device("cpu"))
    scheduler = build_scheduler(optimizer, ScheduleConfig(warmup_steps=2), 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert scheduler.state_dict()["lr_lambdas"] == [None, None]


def test_matrices_decay_and_norms_do_not() -> None:
    model = Llama(ModelConfig(hidden_size=8, num_heads=2, num_kv_heads=1, num_layers=1))
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.3), torch.device("cpu"))
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.dim() == 2 for parameter in matrices["params"])
    assert len(vectors["params"]) == 3
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))
