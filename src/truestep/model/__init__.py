"""Models: loading, the built-in tiny one, and the packed forward pass."""
