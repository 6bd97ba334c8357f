"""The slow twin that judges the training step: float64, one sequence at a time, one backward, textbook
optimizers.

Nothing is imported here, so that ``reference.faults`` stays usable where there is no torch.
"""
