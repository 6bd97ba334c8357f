"""Rollouts: engines that sample, and plans that say what is sampled for a prompt."""
