"""Grading of a completion: find the answer, compare it with the gold answer, and never hang or guess."""

from truestep import Verb

Verb.make(__name__)
