"""Turns what a subject wrote into a verdict: numbers and records, no text. Only the recorder uses torch."""
