"""RL steps: the coefficient of every token in the update, and the objective that these coefficients belong to."""
