"""Durable bytes under keys: local disk, object storage, memory. Knows nothing of tensors."""
