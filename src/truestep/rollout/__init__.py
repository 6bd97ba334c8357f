"""Rollouts: engines that sample, and the sampler that follows a method's plan for each prompt."""
