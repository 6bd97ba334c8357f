"""Compares many runs (arms × seeds) with the same data and budgets, and intervals over seeds and problems."""
