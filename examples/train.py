"""A training script of your own: PyTorch, and of resilient only its context and sampler.

    python examples/train.py runs/mine 2000
    torchrun --nproc-per-node 2 examples/train.py runs/mine 2000

Stop it, kill it, start it again on any number of ranks: it goes on from the newest saved step.
"""

import os
import sys

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import resilient

directory, steps, ranks = sys.argv[1], int(sys.argv[2]), int(os.environ.get("WORLD_SIZE", "1"))
torch.manual_seed(0)
data = TensorDataset(x := torch.randn(8192, 16), x.sin().sum(dim=1, keepdim=True))
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
if ranks > 1:
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
sampler = resilient.Sampler(len(data), global_batch=64)  # of all ranks together; 1, 2, 4, ... ranks get equal shares
state = {"model": model, "optimizer": optimizer, "data": sampler}
with resilient.context(directory, state=state, every=resilient.Every(steps=100)) as run:
    batches = sampler.batches(sampler.loader(data))
    print(f"rank {sampler.place.rank} begins at step {run.step}", flush=True)
    for step in run.steps(steps):
        x, y = next(batches)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 and sampler.place.rank == 0:
            print(f"step {step}  loss {loss.item():.4f}", flush=True)
