"""Recovers what an optimizer step of an installed framework really did from its parameters, on a CPU."""
