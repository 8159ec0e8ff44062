"""A small training for tests, in any layout of DP, FSDP2 and HSDP; its functions run in the ranks of a world."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import resilient
from tests.template import Rank

LAYOUTS: dict[str, tuple[str, int]] = {
    **{f"dp{n}": ("dp", n) for n in range(1, 5)},
    **{f"fsdp{n}": ("fsdp", n) for n in range(1, 5)},
    "hsdp2x2": ("hsdp", 4),
}


class Net(nn.Module):
    """Sizes that no number of ranks divides, dropout, a buffer, a frozen and a tied weight."""

    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 13)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(13, 7), nn.GELU(), nn.Dropout(dropout), nn.Linear(7, 13)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(13)
        self.head = nn.Linear(13, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.seen += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def join(rank: Rank) -> None:
    """Make the process group, where there is more than one rank."""
    torch.set_num_threads(1)
    if rank.size > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")


def lay_out(model: Net, layout: str) -> nn.Module:
    """The model as this layout holds it."""
    kind, size = LAYOUTS[layout]
    if kind == "dp":
        return DistributedDataParallel(model) if size > 1 else model
    if size == 1 and not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape, names = ((2, 2), ("replicate", "shard")) if kind == "hsdp" else ((size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def make_state(layout: str, *, seed: int = 0, dropout: float = 0.1) -> dict[str, Any]:
    """Model, optimizer with two groups, scheduler with milestones by int."""
    model = lay_out(Net(seed, dropout), layout)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "betas": (0.8, 0.9)}], lr=0.01
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 7], gamma=0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train_step(state: dict[str, Any], tokens: torch.Tensor) -> float:
    """One update."""
    loss = nn.functional.cross_entropy(state["model"](tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
    loss.backward()
    state["optimizer"].step()
    state["scheduler"].step()
    state["optimizer"].zero_grad()
    return loss.item()


def tokens_of(step: int, rank: int = 0) -> torch.Tensor:
    """A batch that depends on the step and the rank only."""
    generator = torch.Generator().manual_seed(step * 1000 + rank)
    return torch.randint(0, 11, (2, 5), generator=generator)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor behind a shard. Collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def digest(tensor: torch.Tensor) -> str:
    """Hex digest of dtype, shape and bytes."""
    data = tensor.cpu().contiguous()
    return hashlib.sha256(
        f"{data.dtype}{tuple(data.shape)}".encode() + data.flatten().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def digests(state: dict[str, Any]) -> dict[str, str]:
    """A digest of every whole tensor and every plain value of the state. Collective."""
    model, optimizer = state["model"], state["optimizer"]
    found = {}
    for name, tensor in model.state_dict().items():
        found[name.removeprefix("module.")] = digest(whole(tensor))
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            found[f"{name.removeprefix('module.')}/{slot}"] = digest(whole(value))
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {**found, "groups": repr(groups), "scheduler": repr(state["scheduler"].state_dict())}


def save_one(
    rank: Rank, *, url: str, layout: str, steps: int = 2, options: dict[str, Any] | None = None, ranks_per_node: int = 0
) -> dict[str, str]:
    """Train a little in `layout`, save, and say what was saved."""
    if ranks_per_node:
        os.environ["RESILIENT_NODE"] = str(rank.rank // ranks_per_node)
    join(rank)
    state = make_state(layout, seed=rank.size)
    for step in range(steps):
        train_step(state, tokens_of(step))
    with resilient.Checkpointer(url, storage_options=options) as checkpointer:
        checkpointer.save(steps, state).result(30)
    return digests(state)


def restore_many(
    rank: Rank, *, urls: dict[str, str], layout: str, options: dict[str, Any] | None = None
) -> dict[str, dict[str, str]]:
    """Restore each checkpoint into a fresh state of `layout`, and say what came."""
    join(rank)
    found = {}
    for source, url in urls.items():
        state = make_state(layout, seed=99)
        with resilient.Checkpointer(url, storage_options=options) as checkpointer:
            assert checkpointer.restore(state) == 2
        found[source] = digests(state)
    return found
