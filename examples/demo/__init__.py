"""The demonstration: train, kill, go on with other numbers of ranks, and prove that nothing was lost."""
