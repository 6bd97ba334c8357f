"""A run: its data checked, its stages in order, each a function from one model folder to the next."""
