"""Training: the loop, the optimizer step, and everything that the step needs."""

from truestep import Verb

Verb.make(__name__)
