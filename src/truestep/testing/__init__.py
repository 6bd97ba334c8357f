"""Code that checks the package; only its tests import it."""
