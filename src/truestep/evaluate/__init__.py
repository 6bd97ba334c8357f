"""Evaluation of a model: every sample is accounted for, and every score has an interval."""
