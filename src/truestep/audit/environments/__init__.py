"""Where subjects run: virtual environments, child processes, this process; and the search over releases."""
