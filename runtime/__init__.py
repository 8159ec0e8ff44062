"""A small, complete training runtime on torch.distributed."""
