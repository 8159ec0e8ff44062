"""Fault-tolerant training state for PyTorch. Attributes are imported on first use."""
