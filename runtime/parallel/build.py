"""From a model's configuration to the model on its mesh, with the same weights in any layout."""

from __future__ import annotations

import torch
from torch import nn

from runtime.config import ModelConfig, ParallelConfig
from runtime.mesh import Mesh
from runtime.models.llama import Llama, initialise
from runtime.parallel.precision import compute_dtype
from runtime.parallel.replicate import replicate_model
from runtime.parallel.shard import shard_model


def build_model(config: ModelConfig, parallel: ParallelConfig, mesh: Mesh, seed: int) -> nn.Module:
    """The model, laid out and initialised; a rank holds no more than its part and one whole parameter. Collective."""
    with torch.device("meta"):
        model = Llama(config)
    layers = model.decoder_layers()
    for layer in layers:
        layer.recompute = parallel.activation_checkpointing == "full"
    if mesh.layout.shard > 1:
        dtype = compute_dtype(parallel, mesh.device)
        shard_model(model, layers, mesh, dtype=dtype, reshard_after_forward=parallel.reshard_after_forward)
    model.to_empty(device=mesh.device)
    initialise(model, config, seed)
    if mesh.layout.shard == 1 and mesh.layout.replicate > 1:
        return replicate_model(model, mesh)
    return model
