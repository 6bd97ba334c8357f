"""An audit's child process. ``child.py FOLDER SUBJECT`` runs a subject on the cases in FOLDER/spec.json."""

import importlib
import sys

import harness

harness.main(importlib.import_module(sys.argv[2]).run)
