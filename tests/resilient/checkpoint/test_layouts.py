"""State of several ranks: every layout restores into every other, and into itself bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from resilient.checkpoint import rng, values
from resilient.checkpoint.state import PerRank, flatten
from resilient.errors import StateInvalid, StateMismatch
from tests.resilient.checkpoint.memory import bits, restore, save

HERE = "tests.resilient.checkpoint.test_layouts"


class Net(nn.Module):
    """Sizes that four ranks do not divide; the last bias leaves rank 3 with nothing."""

    def __init__(self):
        super().__init__()
        self.wide, self.norm, self.out = nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, x):
        return self.out(nn.functional.dropout(self.norm(self.wide(x)), 0.2)) * self.scale


def build(layout, seed):
    torch.manual_seed(seed)
    net = Net()
    size = dist.get_world_size()
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        net.wide = checkpoint_wrapper(net.wide)
        fully_shard(net.wide, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        fully_shard(net, mesh=mesh)
    elif layout == "fsdp x tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        net.scale.requires_grad_(False)
        parallelize_module(
            net,
            mesh["tp"],
            {"wide": ColwiseParallel(output_layouts=Replicate()), "out": RowwiseParallel(input_layouts=Replicate())},
        )
        fully_shard(net.wide, mesh=mesh["fsdp"])
        fully_shard(net.out, mesh=mesh["fsdp"])
    model = DistributedDataParallel(net) if layout == "ddp" else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=layout == "hsdp" or None)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    }


def train(state, steps):
    for _ in range(steps):
        state["optimizer"].zero_grad()
        state["model"](torch.randn(4, 10)).square().mean().backward()
        state["optimizer"].step()
        state["scheduler"].step()


def fill(state, seed):
    """Give every parameter of any layout optimizer state and content that is the same on all ranks."""
    for number, parameter in enumerate(state["optimizer"].param_groups[0]["params"]):
        torch.manual_seed(seed + number)
        whole = [torch.randn(parameter.shape) for _ in range(3)]
        if isinstance(parameter, DTensor):
            whole = [distribute_tensor(w, parameter.device_mesh, parameter.placements) for w in whole]
        with torch.no_grad():
            parameter.copy_(whole[0])
        if number != 1:  # one that never had a gradient
            state["optimizer"].state[parameter] = {
                "step": torch.tensor(float(seed)),
                "exp_avg": whole[1],
                "exp_avg_sq": whole[2],
            }


def every_pair(rank, layouts):
    dist.init_process_group("gloo")
    saved = {}
    for layout in layouts:
        state = build(layout, 1)
        fill(state, 7)
        saved[layout] = save(state)
    problems = []
    for a, b in itertools.product(layouts, layouts):
        live = build(b, 2)
        restore(saved[a], live)
        again = save(live)
        if again.infos != saved[a].infos or again.values != saved[a].values:
            problems.append([a, b, "names"])
        problems += [[a, b, n] for n in again.infos if again.whole(n).tobytes() != saved[a].whole(n).tobytes()]
        if a == b and saved[a].pieces.keys() != again.pieces.keys():
            problems.append([a, b, "boxes"])
    return [problems, len(saved[layouts[0]].infos)]


@pytest.mark.parametrize(
    ("size", "layouts"), [(4, ["plain", "ddp", "fsdp", "hsdp", "fsdp x tp"]), (3, ["ddp", "fsdp"])]
)
def test_every_layout_restores_into_every_other_to_the_bit(world, size, layouts):
    for problems, tensors in world(size).run(f"{HERE}:every_pair", layouts=layouts, deadline_s=60):
        assert problems == []
        assert tensors == 8 + 3 * 6  # parameters and a buffer; three of state for all parameters but one


def goes_on(rank, layout):
    dist.init_process_group("gloo")
    torch.manual_seed(rank.rank)
    saved = build(layout, 1)
    torch.manual_seed(50 + rank.rank)
    train(saved, 3)
    memory, random = save(saved), values.encode(rng.capture())
    train(saved, 3)
    live = build(layout, 2)
    torch.manual_seed(99)
    restore(memory, live)
    rng.restore(values.decode(random))
    train(live, 3)
    mine, other = bits(saved), bits(live)
    return [name for name in mine if mine[name] != other.get(name)] + sorted(other.keys() - mine.keys())


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "hsdp"])
def test_the_same_layout_goes_on_bit_for_bit_with_dropout(world, layout):
    assert world(4 if layout == "hsdp" else 2).run(f"{HERE}:goes_on", layout=layout, deadline_s=60) in (
        [[]] * 2,
        [[]] * 4,
    )


def buffers_of_ddp(rank):
    dist.init_process_group("gloo")
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model = DistributedDataParallel(net)
    torch.manual_seed(rank.rank)
    model(torch.randn(8, 2)).sum().backward()
    memory = save({"model": model})
    own = net[1].running_mean.tolist()
    net[1].running_mean.zero_()
    restore(memory, {"model": model})
    return [own, net[1].running_mean.tolist()]


def test_buffers_of_ddp_are_those_of_its_rank_0_as_in_its_next_forward(world):
    (own_0, back_0), (own_1, back_1) = world(2).run(f"{HERE}:buffers_of_ddp", deadline_s=30)
    assert own_0 != own_1
    assert back_0 == back_1 == own_0


def odd_state(rank):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    out = {}

    # DTensors by themselves, an object that holds one, and each rank's own.
    def make(x):
        return {
            "d": distribute_tensor(torch.arange(5.0) * x, mesh, [Shard(0)]),
            "held": Held(distribute_tensor(torch.arange(6.0).view(2, 3) * x, mesh, [Shard(1)])),
        }  # fmt: skip

    live = make(0)
    restore(save(make(1)), live)
    out["d"] = live["d"].full_tensor().tolist()
    out["held"] = [live["held"].value.full_tensor().tolist(), str(live["held"].value.placements)]
    try:
        flatten({"p": DTensor.from_local(torch.ones(2), mesh, [Partial()])})
    except StateInvalid as error:
        out["partial"] = str(error)

    own = {"mine": PerRank({"n": rank.rank, "t": torch.full((rank.rank + 1,), 7.0)}), "held": PerRank(Held(rank.rank))}
    memory = save(own)
    back = {"mine": PerRank({"n": -1, "t": torch.zeros(rank.rank + 1)}), "held": PerRank(Held(None))}
    restore(memory, back)
    out["own"] = [back["mine"].value["n"], back["mine"].value["t"].tolist(), back["held"].value.value]

    # Factored state follows no parameter's boxes: the same layout restores it, another refuses.
    def factored(seed):
        torch.manual_seed(seed)
        net = nn.Linear(4, 6)
        fully_shard(net, mesh=mesh)
        return {"net": net, "o": Factored(net.parameters(), {})}

    def step(state):
        torch.manual_seed(5)
        state["o"].zero_grad()
        state["net"](torch.randn(3, 4)).sum().backward()
        state["o"].step()

    a, b = factored(1), factored(2)
    step(a)
    memory = save(a)
    restore(memory, b)
    step(a), step(b)
    out["factored"] = [name for name, data in bits(a).items() if bits(b).get(name) != data]
    try:
        restore(memory, factored(3), same_layout=False)
    except StateMismatch as error:
        out["resharded"] = str(error)
    return out


class Factored(torch.optim.Optimizer):
    """Keeps a sum per row, and a packed copy of what this rank holds."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            local, state = parameter.grad.to_local(), self.state[parameter]
            rows = DTensor.from_local(
                local.reshape(len(local), -1).sum(1, keepdim=True), parameter.device_mesh, [Shard(0)]
            )
            state["rows"] = state["rows"] + rows if "rows" in state else rows
            state["packed"] = local.flatten().to(torch.int8)
            parameter.sub_(state["rows"].view(-1, *[1] * (parameter.dim() - 1)) * 0.1)


class Held:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_dtensors_ranks_own_and_state_that_cannot_be_resharded(world):
    for number, out in enumerate(world(2).run(f"{HERE}:odd_state", deadline_s=40)):
        assert out["own"] == [number, [7.0] * (number + 1), number]
        assert out["d"] == [0, 1, 2, 3, 4]
        assert out["held"] == [[[0, 1, 2], [3, 4, 5]], "(Shard(dim=1),)"]
        assert "pending reduction" in out["partial"]
        assert out["factored"] == []
        assert "cannot be resharded" in out["resharded"]
