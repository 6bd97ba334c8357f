"""From what a subject left to a verdict: numbers and records, no words, no torch."""
