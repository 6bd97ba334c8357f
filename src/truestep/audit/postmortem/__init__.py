"""Tells from the files of a past run whether a measured fault affected it. No code is run."""
