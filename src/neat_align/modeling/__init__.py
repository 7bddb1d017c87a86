"""Models: loading them, putting groups through them, and reading log-probabilities off.

loading.py        policy and tokenizer by name or path
load_options.py   number type, attention and 4 bits of what is loaded
demo_model.py     the embedded SmolLM2-135M-Instruct: found and converted without a hub
text_config.py    the language model's own configuration, and its context
adapters.py       adapter folders, put on their base model
target_modules.py the modules that an adapter is asked to be put on
merging.py        an adapter merged into the weights below it, where that changes nothing
merged_folder.py  an adapter merged into its base, as a folder that plain transformers loads
device.py         the accelerator where there is one, else the CPU; what is free there
model_shape.py    what a model's memory depends on, counted or from its configuration
memory_estimate.py  how much memory a run takes, from that shape and its options
requirements.py   what a model must be to be a policy; dropout off
reference.py      the start policy: a frozen copy, or the adapter switched off
precision.py      number types: autocast, inference, a half-precision copy
packing.py        groups as tensors: packed rows (a prompt once), padded or unpadded rows
layout.py         which of them a model is given: decides, by measuring
self_check.py     a model compared with itself: alone, in a batch, in training mode
rounding.py       how far apart two computations may be by rounding alone
known_padding.py  attention masks without asking a GPU whether rows are padded
outputs.py        a model called for its logits, whatever its configuration asks for
shared_prefix.py  attention in which the completions of a group share one prompt
prefix_products.py  the same by matrix products: in half precision on CPUs
chunked_head.py   log-probabilities of chosen tokens without holding the logits
chunked_values.py what needs a token's whole distribution, chunk by chunk
head_inputs.py    a model cut in front of its head: logits a chunk at a time
lockstep.py       ranks that share a model's weights make the same forward passes
whole_weights.py  weights by name, gathered where ranks hold parts of them
logprobs.py       model and rows in, per-token log-probabilities out
contrast.py       the contrast of two instructions at every token, as a distribution
kl.py             exact KL to the start policy, and entropy
"""
