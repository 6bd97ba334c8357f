"""From what a subject wrote to a verdict: only numbers and records, no text, no torch."""
