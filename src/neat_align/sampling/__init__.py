"""Sampling: the `Sampler` protocol, and the samplers that keep it."""
