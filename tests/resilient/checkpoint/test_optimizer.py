"""Optimizers and schedulers go on bit for bit from a fresh process's objects."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from resilient.checkpoint.state import prepare
from resilient.errors import StateInvalid, StateMismatch
from tests.resilient.checkpoint.memory import bits, restore, save, scramble


class Net(nn.Module):
    """Frozen, unused and scalar parameters beside ordinary ones."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)
        self.frozen, self.unused = nn.Linear(4, 6), nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.second(nn.functional.dropout(self.first(x) + self.frozen(x), 0.3)) * self.scale


def groups(net):
    decay = [p for p in net.parameters() if p.dim() > 1]
    rest = [p for p in net.parameters() if p.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02, "tag": "rest"}]


OPTIMIZERS = {
    "AdamW foreach": lambda net: torch.optim.AdamW(groups(net), lr=0.01, foreach=True),
    "AdamW fused": lambda net: torch.optim.AdamW(groups(net), lr=0.01, fused=True, amsgrad=True),
    "AdamW for-loop": lambda net: torch.optim.AdamW(groups(net), lr=0.01, foreach=False, betas=(0.8, 0.99)),
    "AdamW tensor lr": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01)),
    "AdamW named": lambda net: torch.optim.AdamW(net.named_parameters(), lr=0.01),
    "SGD momentum": lambda net: torch.optim.SGD(groups(net), lr=0.01, momentum=0.9, nesterov=True),
    "SGD plain": lambda net: torch.optim.SGD(groups(net), lr=0.01),
    "NAdam": lambda net: torch.optim.NAdam(groups(net), lr=0.01),
    "Adagrad": lambda net: torch.optim.Adagrad(groups(net), lr=0.01),
    "RMSprop": lambda net: torch.optim.RMSprop(groups(net), lr=0.01, momentum=0.9, centered=True),
    "Adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=0.01),
    "ASGD": lambda net: torch.optim.ASGD(net.parameters(), lr=0.01),
    "Rprop": lambda net: torch.optim.Rprop(net.parameters(), lr=0.01),
    "LBFGS": lambda net: torch.optim.LBFGS(list(net.first.parameters()), lr=0.1, max_iter=3, history_size=2),
}


class Curve:
    """A callable whose own state LambdaLR saves."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate**step


SCHEDULERS = {
    "none": lambda o: schedulers.ConstantLR(o, factor=1.0),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[2, 4, 4, 6], gamma=0.5),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.CosineAnnealingLR(o, T_max=9)], milestones=[3]
    ),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [Curve(0.9), lambda step: 1 / (1 + step)][: len(o.param_groups)]),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=False),
    "Chained": lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 3)]),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False),
}


def build(optimizer="AdamW foreach", scheduler="none", seed=0):
    torch.manual_seed(seed)
    net = Net()
    made = OPTIMIZERS[optimizer](net)
    return {"model": net, "optimizer": made, "scheduler": SCHEDULERS[scheduler](made)}


def train(state, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        x = torch.randn(5, 4)

        def closure(x=x):
            state["optimizer"].zero_grad()
            loss = state["model"](x).square().mean()
            loss.backward()
            return loss

        losses.append(state["optimizer"].step(closure).item())
        state["scheduler"].step()
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(optimizer):
    saved = build(optimizer)
    train(saved, 3)
    memory = save(saved)
    expected = train(saved, 3, 3)
    live = build(optimizer, seed=9)
    restore(memory, live)
    assert train(live, 3, 3) == expected
    assert bits(live) == bits(saved)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_goes_on_bit_for_bit(scheduler):
    saved = build(scheduler=scheduler)
    train(saved, 3)
    memory = save(saved)
    expected = train(saved, 6, 3)
    live = build(scheduler=scheduler, seed=9)
    restore(memory, live)
    assert train(live, 6, 3) == expected
    assert bits(live) == bits(saved)
    assert [g["lr"] for g in live["optimizer"].param_groups] == [g["lr"] for g in saved["optimizer"].param_groups]


def test_a_scheduler_that_watches_a_metric_goes_on():
    def make(seed):
        net = build(seed=seed)["model"]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return {"model": net, "o": optimizer, "s": schedulers.ReduceLROnPlateau(optimizer, patience=1, min_lr=1e-3)}

    saved, live = make(0), make(1)
    for _ in range(4):
        saved["s"].step(1.0)
    restore(save(saved), live)
    assert live["o"].param_groups[0]["lr"] == saved["o"].param_groups[0]["lr"] < 0.1
    assert bits(live) == bits(saved)


def test_the_gradient_scaler_goes_on():
    saved, live = (torch.amp.GradScaler("cpu", init_scale=s, growth_interval=2) for s in (8.0, 4.0))
    saved.scale(torch.ones(1))
    saved.update(64.0)
    restore(save({"scaler": saved}), {"scaler": live})
    assert live.state_dict() == saved.state_dict()
    off = torch.amp.GradScaler("cpu", enabled=False)
    restore(save({"scaler": off}), {"scaler": off})


def test_no_step_is_run_to_make_the_state():
    saved = build()
    train(saved, 2)
    live = build(seed=9)
    calls = []
    live["optimizer"].register_step_pre_hook(lambda *_: calls.append("step"))
    before = [p.clone() for p in live["model"].parameters()]
    memory = save(saved)
    restore(memory, live, only="optimizer")
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(before, live["model"].parameters(), strict=True))
    assert (
        bits({"model": saved["model"], "o": saved["optimizer"]}).keys()
        == bits({"model": live["model"], "o": live["optimizer"]}).keys()
    )


def test_nothing_is_attached_before_everything_is_read():
    saved, live = build(), build(seed=9)
    train(saved, 2)
    memory = save(saved)
    restoration = prepare(live, memory.infos, memory.values)
    assert not live["optimizer"].state
    assert live["optimizer"].param_groups[0]["lr"] == 0.01
    restoration.finish()
    assert live["optimizer"].state


def test_a_checkpoint_from_before_the_first_step_takes_the_state_away():
    saved, live = build(), build(seed=9)
    memory = save(saved)
    train(live, 2)
    restore(memory, live)
    assert not live["optimizer"].state
    assert train(live, 3) == train(saved, 3)


def test_a_live_state_tensor_that_fits_is_filled_in_place():
    saved, live = build(), build(seed=9)
    train(saved, 2), train(live, 1)
    weight = live["model"].first.weight
    moment = live["optimizer"].state[weight]["exp_avg"]
    restore(save(saved), live)
    assert live["optimizer"].state[weight]["exp_avg"] is moment
    assert bits(live) == bits(saved)


def test_state_of_another_precision_than_its_parameter_keeps_it():
    """torch's own load_state_dict would round the float32 moments to the parameter's bfloat16."""
    saved, live = nn.Linear(3, 3, dtype=torch.bfloat16), nn.Linear(3, 3, dtype=torch.bfloat16)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (saved, live)]
    optimizers[0].state[saved.weight]["momentum_buffer"] = torch.rand(3, 3)
    restore(save({"m": saved, "o": optimizers[0]}), {"m": live, "o": optimizers[1]})
    moment = optimizers[1].state[live.weight]["momentum_buffer"]
    assert moment.dtype == torch.float32
    assert torch.equal(moment, optimizers[0].state[saved.weight]["momentum_buffer"])


def test_options_follow_the_parameters_not_their_order():
    saved, live = build(), build(seed=9)
    train(saved, 1)
    saved["optimizer"].param_groups[0]["lr"], saved["optimizer"].param_groups[1]["lr"] = 0.3, 0.7
    live["optimizer"].param_groups.reverse()
    for group in live["optimizer"].param_groups:
        group["params"].reverse()
    restore(save(saved), live)
    first, second = live["optimizer"].param_groups
    assert (first["tag"], first["lr"], second["lr"], second["weight_decay"]) == ("rest", 0.7, 0.3, 0.1)


def test_how_a_step_is_computed_belongs_to_the_program_not_to_the_state():
    saved, live = build("AdamW foreach"), build("AdamW for-loop", seed=9)
    train(saved, 1)
    restore(save(saved), live)
    assert live["optimizer"].param_groups[0]["foreach"] is False
    assert live["optimizer"].param_groups[0]["betas"] == (0.9, 0.999)


def test_a_learning_rate_may_become_a_tensor_and_a_tensor_a_number():
    saved, live = build("AdamW tensor lr"), build("AdamW named", seed=9)
    saved["optimizer"].param_groups[0]["lr"].fill_(0.25)
    restore(save(saved), live, only=["model", "optimizer"])
    assert live["optimizer"].param_groups[0]["lr"] == 0.25
    assert type(live["optimizer"].param_groups[0]["lr"]) is float
    tensor = saved["optimizer"].param_groups[0]["lr"]
    live["optimizer"].param_groups[0]["lr"] = 0.5
    restore(save(live), saved, only=["model", "optimizer"])
    assert saved["optimizer"].param_groups[0]["lr"] is tensor
    assert tensor.item() == 0.5


def test_groups_that_were_cut_otherwise_are_refused_where_their_options_differ():
    saved = build("AdamW foreach")
    live = build("AdamW named")
    with pytest.raises(StateMismatch, match=r"different options: \['initial_lr', 'lr', 'tag', 'weight_decay'\]"):
        restore(save(saved), live, only=["model", "optimizer"])


def test_a_parameter_without_a_name_is_refused_with_the_hint():
    net = nn.Linear(2, 2)
    with pytest.raises(StateInvalid, match=r'state=\{"model": model, "optimizer": optimizer\}'):
        save({"optimizer": torch.optim.SGD(net.parameters(), lr=0.1)})


def test_a_parameter_in_the_state_by_itself_has_a_name():
    def make():
        w = torch.ones(3, requires_grad=True)
        return {"w": w, "o": torch.optim.SGD([w], lr=0.1, momentum=0.9)}

    saved, live = make(), make()
    saved["w"].sum().backward()
    saved["o"].step()
    restore(save(saved), live)
    assert bits(live) == bits(saved)
    assert "o/w/momentum_buffer" in bits(live)


def test_new_parameters_are_missing_and_gone_ones_unexpected():
    saved, live = build(), build(seed=9)
    train(saved, 1)
    live["model"].extra = nn.Parameter(torch.zeros(2))
    live["optimizer"].add_param_group({"params": [live["model"].extra]})
    with pytest.raises(StateMismatch, match="optimizer/model/extra"):
        restore(save(saved), live)
    report = restore(save(saved), live, strict=False)
    assert report.left_out == (
        "model/extra: not in the checkpoint (a parameter or buffer)",
        "optimizer/model/extra: not in the checkpoint (state of a parameter)",
    )
    train(live, 1)
    with pytest.raises(StateMismatch, match=r"only in the checkpoint: model/extra, optimizer/model/extra/@options"):
        restore(save(live), saved)


def test_only_some_parameters_state():
    saved, live = build(), build(seed=9)
    train(saved, 2)
    restore(save(saved), live, only="optimizer/model/first.*")
    assert set(live["optimizer"].state) == {live["model"].first.weight, live["model"].first.bias}


def test_a_tied_parameters_state_is_found_by_any_of_its_names():
    class Tied(nn.Module):
        def __init__(self, tied, order):
            super().__init__()
            for name in order:
                setattr(self, name, nn.Linear(2, 2, bias=False))
            if tied:
                self.b.weight = self.a.weight

    def make(tied, order):
        net = Tied(tied, order)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for number, parameter in enumerate(net.parameters()):
            optimizer.state[parameter]["momentum_buffer"] = torch.full((2, 2), float(number))
        return {"m": net, "o": optimizer}

    saved = make(True, "ab")
    saved["o"].state[saved["m"].a.weight]["momentum_buffer"].fill_(5)
    for tied, order in ((True, "ba"), (False, "ab")):
        live = make(tied, order)
        restore(save(saved), live)
        for parameter in live["m"].parameters():
            assert live["o"].state[parameter]["momentum_buffer"].tolist() == [[5, 5], [5, 5]]
    restore(save(make(False, "ab")), saved)
    assert saved["o"].state[saved["m"].a.weight]["momentum_buffer"].tolist() == [[0, 0], [0, 0]]


def test_two_optimizers_and_a_moving_average_beside_the_model():
    def make(seed):
        torch.manual_seed(seed)
        net = Net()
        average = torch.optim.swa_utils.AveragedModel(net)
        halves = [torch.optim.AdamW(net.first.parameters()), torch.optim.SGD(net.second.parameters(), momentum=0.5)]
        return {"optimizers": halves, "model": net, "ema": average}

    saved, live = make(0), make(1)
    for optimizer in saved["optimizers"]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    saved["ema"].update_parameters(saved["model"])
    memory = save(saved)
    assert "optimizers/1/model/second.weight/momentum_buffer" in memory.infos
    assert "ema/n_averaged" in memory.infos
    scramble(live["model"])
    restore(memory, live)
    assert bits(live) == bits(saved)
