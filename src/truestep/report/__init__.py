"""Shows people what a run did: reads the files of a run directory and computes no statistic."""
