"""Seeing trouble: progress of the loop in shared memory."""
