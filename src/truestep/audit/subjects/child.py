"""The child process of an audit. ``child.py FOLDER SUBJECT`` runs a subject on FOLDER/spec.json's cases."""

import importlib
import sys

import harness

harness.main(importlib.import_module(sys.argv[2]).run)
