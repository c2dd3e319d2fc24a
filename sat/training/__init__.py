"""Training: the step, the loop, optimizers, checkpoints, metrics."""
