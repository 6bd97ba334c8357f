"""How good a model is, with every sample accounted for and an interval around every number."""
