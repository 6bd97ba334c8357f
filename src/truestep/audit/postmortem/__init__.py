"""Was a past run hit? Answered from the files that it left; nothing is run."""
