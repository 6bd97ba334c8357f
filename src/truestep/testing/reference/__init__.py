"""A slow float64 reference for the training step. It runs one sequence at a time with textbook optimizers."""
