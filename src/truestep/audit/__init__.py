"""Recovers what an optimizer step of an installed framework did on a CPU, from the changed parameters."""
