"""A run. All data is checked, then the stages run in order, each from one model folder to the next."""
