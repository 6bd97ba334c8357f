"""Compares many runs: arms × seeds, the same data and budgets, intervals over seeds and problems."""
