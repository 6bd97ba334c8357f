"""Evaluation of a model: every sample is accounted for, and every score has an interval."""

from truestep import Verb

Verb.make(__name__)
