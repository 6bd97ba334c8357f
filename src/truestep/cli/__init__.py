"""The command line: one file a verb; parse → build → call."""
