"""The run's log: one truth, written by put-if-absent only."""
