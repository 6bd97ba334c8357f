"""Crash-safe checkpoints, and the export of a finished model as a Hugging Face folder."""
