"""Recovers from the parameters what an optimizer step of an installed framework really did, on a CPU."""
