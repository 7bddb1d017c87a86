"""Which number types and attentions a model may be loaded with. Names are those of TRL."""

from __future__ import annotations

DTYPES = ("auto", "float32", "bfloat16", "float16")
# transformers would take a kernel's name on the hub as well, and run the code that it finds there.
ATTENTIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
)
