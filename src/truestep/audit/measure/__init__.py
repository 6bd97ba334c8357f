"""Turns what a subject wrote into a verdict, as numbers and records. Only the recorder uses torch."""
