"""Was a past run affected? The files that it left answer this; no code is run."""
