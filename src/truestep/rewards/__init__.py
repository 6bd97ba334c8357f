"""Rewards: the functions of a recipe, run in child processes, and their weighted sum."""
