"""Runs subjects in virtual environments, child processes or this process, and searches over releases."""
