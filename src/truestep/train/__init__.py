"""Training: the loop, the step, and what the step needs."""
