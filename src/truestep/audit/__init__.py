"""What an optimizer step of an installed framework really did, recovered from its parameters on a CPU."""
