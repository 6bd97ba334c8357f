"""Objectives as pure functions: log-probabilities, detached coefficients, one division, a table of methods."""
