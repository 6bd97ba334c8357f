"""Objectives as pure functions: log-probabilities, detached coefficients, one division, and the methods."""
