"""Tokenizers with the chat templates of model families, cut down to what these write around turns,
calls of tools and results: `from template_families import FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from transformers import AddedToken

from tiny import CHATML, tiny_tokenizer

QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + (m.role if m.role != 'tool' else 'user') + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% if m.role == 'tool' %}{{ '<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{{ '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + "
    "eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) "
    "+ '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS]' }}{% for c in m.tool_calls %}"
    "{{ c.function.name + '[ARGS]' + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Zephyr, Phi and GLM name roles in tokens of their own; GLM's turns have no end.
GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think></think>\n' }}{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def family(template: str, special: list[str], ordinary: list[str], eos: str = "<|im_end|>") -> Any:
    tokenizer = tiny_tokenizer("none", bos=True)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in special], special_tokens=True)
    tokenizer.add_tokens(ordinary)
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


THINK = ["<think>", "</think>"]
QWEN3_TOK = family(QWEN3, [], [*THINK, "<tool_call>", "</tool_call>", "<tool_response>"])
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
FAMILIES = {
    "qwen3": QWEN3_TOK,
    "special think": family(QWEN3, THINK, []),
    "r1": family(R1, ["<|User|>", "<|Assistant|>"], THINK),
    "llama3": family(LLAMA3, HEADERS, [], eos="<|eot_id|>"),
    "gemma": family(GEMMA, ["<start_of_turn>", "<end_of_turn>"], []),
    "mistral": family(
        MISTRAL,
        [
            *("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
            *("[THINK]", "[/THINK]", "</s>"),
        ],
        [],
        eos="</s>",
    ),
    "glm": family(GLM, ["<|user|>", "<|system|>"], [*THINK, "<|assistant|>", "<|observation|>"]),
    "not in the template": family(CHATML, [], [*THINK, "<answer>"]),
}
