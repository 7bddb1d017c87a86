"""Sampling: the `Sampler` protocol, and the samplers that keep it.

    protocol.py              what a sampler is asked for and what it gives back; no torch
    transformers_sampler.py  a transformers model on any device
    draw.py                  one token from one random number: what a sampler owes its seed
    decode_attention.py      faster attention for one new token a sequence, on a CPU

A sampler of another engine is a new file beside `transformers_sampler.py`; `neat_align.trainer`
makes the sampler of a run.
"""
