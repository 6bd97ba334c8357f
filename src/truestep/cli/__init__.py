"""The command line. Each command has a file, which reads the options and calls the rest of the package."""
