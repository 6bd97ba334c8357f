"""Shows people what a run did. It reads the files in a run directory and computes no statistic."""
