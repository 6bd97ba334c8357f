"""The slow twin that judges the training step: float64, one sequence at a time, one backward, textbook
optimizers."""
