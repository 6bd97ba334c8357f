"""The command line: one file per command, which parses, builds and calls."""
