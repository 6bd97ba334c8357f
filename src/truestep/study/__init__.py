"""Compares many runs (arms × seeds) on the same data and budgets, with intervals over seeds and problems."""
