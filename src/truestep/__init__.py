"""truestep: SFT-then-RL training in which every optimizer step is provably the one that was asked for."""

__version__ = "0.1.0"
