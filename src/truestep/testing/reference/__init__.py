"""The slow twin of the training step: float64, one sequence at a time, textbook optimizers."""
