"""What a run did, for people: reads the files of a run directory and computes no statistic."""
