"""From a completion to a verdict: find the answer, compare it with the gold one, never hang or guess."""
