"""From what a subject left behind to a verdict: numbers and records, no words. The base package imports it:
no torch."""
