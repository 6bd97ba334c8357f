"""Objectives as data: log-probabilities, detached coefficients, one division, and the table of methods. Pure functions."""
