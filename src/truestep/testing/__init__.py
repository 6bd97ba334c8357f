"""Code that checks the package. Only the tests import it."""
