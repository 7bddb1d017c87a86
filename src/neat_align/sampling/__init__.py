"""Sampling: the `Sampler` protocol, and the samplers that keep it.

    protocol.py              what a sampler is asked for and what it gives back; no torch
    transformers_sampler.py  a transformers model on any device
    batch_check.py           which prompts a model samples together: decides, by measuring
    policies.py              the current and the start policy, scored and sampled in one way
    policy_now.py            what a sampler of another engine is told: weights, version, scores
    checked_sampler.py       checks its samples against the trainer's own model
    vllm_sampler.py          a vLLM server, asked for a completion a request
    vllm_client.py           what is said to it, and what it answers
    vllm_weights.py          giving it the policy's weights, each version once
    vllm_nccl.py             the same from GPU to GPU, by vLLM's weight-transfer engine
    nccl.py                  NCCL's own functions, to send to another program's processes
    draw.py                  one token from one random number: what a sampler owes its seed
    drawing.py               the tokens while they are drawn, and who comes when others have ended
    by_generate.py           the same inside of transformers' `generate`
    shares.py                requests that are drawn together, and who hears what has ended
    token_rows.py            rows that a model reads on, a token at a time
    shared_rows.py           the same with each prompt kept once for its completions, on a CPU
    row_kinds.py             which kind of rows a model reads
    contrast_decoding.py     decoding from the contrast of instructions, inside of `generate`
    contrast_sampler.py      the same as a sampler, with its KL to the plain policy
    decode_attention.py      faster attention for one new token a sequence, on a CPU
    decode_check.py          which attention a model decodes with: decides, by comparing

A sampler of another engine is a new file beside `transformers_sampler.py` that keeps `protocol.py`:
a completion depends on its request alone, and `logprob` is the untempered policy's. `policies.py`
makes the sampler of a run anew for every round, which is when an engine has to get the new weights;
`cli/probe_run.py` makes the probe's.
"""
