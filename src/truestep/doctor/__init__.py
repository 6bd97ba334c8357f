"""``truestep doctor``: what is installed, and whether truestep computes on this machine's GPUs what it computes on processors."""
