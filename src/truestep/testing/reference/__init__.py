"""A slow reference for the training step: float64, one sequence at a time, textbook optimizers."""
