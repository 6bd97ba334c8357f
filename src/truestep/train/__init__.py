"""Training: the loop, the optimizer step, and everything that the step needs."""
