"""Runs a recipe: checks all data, then trains the stages in order, each from the previous stage's model."""
