"""Training: loss, step, optimiser, loop, checkpoints, metrics, recipes. Needs the extra `train`."""
