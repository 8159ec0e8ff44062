"""Checkpoints: state -> plan -> snapshot -> chunks -> objects -> index -> manifest -> log, and back."""
