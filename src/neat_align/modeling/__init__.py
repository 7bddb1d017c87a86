"""Models: loading them, putting groups through them, and reading log-probabilities off.

loading.py        policy and tokenizer by name or path
text_config.py    the language model's own configuration, and its context
requirements.py   what a model must be to be a policy; dropout off
reference.py      the start policy: a frozen copy, or the adapter switched off
precision.py      number types: autocast, inference, a half-precision copy
packing.py        groups as tensors: packed rows (a prompt once) or padded rows
layout.py         which of the two a model is given: decides, by measuring
known_padding.py  attention masks without asking a GPU whether rows are padded
shared_prefix.py  attention in which the completions of a group share one prompt
chunked_head.py   log-probabilities of chosen tokens without holding the logits
logprobs.py       model and rows in, per-token log-probabilities out
kl.py             exact KL to the start policy, and entropy
"""
