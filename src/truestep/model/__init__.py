"""Models: loading, the built-in tiny model, and the packed forward pass."""
