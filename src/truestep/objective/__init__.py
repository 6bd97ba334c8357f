"""Objectives as data: log-probabilities, detached coefficients, one division, the table of methods. Pure
functions."""
