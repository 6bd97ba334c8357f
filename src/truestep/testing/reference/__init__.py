"""A slow float64 reference for the training step, one sequence at a time, with textbook optimizers."""
