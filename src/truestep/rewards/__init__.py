"""Rewards: the functions of a recipe, which run in child processes, and the weighted sum of their values."""
