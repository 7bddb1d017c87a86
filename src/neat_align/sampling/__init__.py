"""Sampling: a small protocol, and the samplers that keep it."""

from __future__ import annotations

from neat_align.sampling.protocol import Sample, Sampler, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import Room, TransformersSampler

__all__ = ["Room", "Sample", "SampleRequest", "Sampler", "SamplingParams", "TransformersSampler"]
