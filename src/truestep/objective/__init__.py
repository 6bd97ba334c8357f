"""Objectives as pure functions: log-probabilities, detached coefficients, one division, the methods."""
