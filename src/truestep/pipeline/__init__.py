"""A run: its data is checked, then its stages run in order, each a function from a model folder to the next."""
