"""`tools` and `chat_template_kwargs`: read from a row's columns, joined with the run's option."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from neat_align.errors import DataError, short
from neat_align.prompts.rows import NO_INPUTS, PromptRow, TemplateInputs

COLUMNS = ("tools", "chat_template_kwargs")
# Arguments of `apply_chat_template` that are not the template's, and variables of every template
# that neat-align itself sets.
_RESERVED = {
    "tools": "give a tools column",
    "messages": "that is the prompt",
    "conversation": "that is the prompt",
    "chat_template": "set tokenizer.chat_template",
    **dict.fromkeys(
        (
            "add_generation_prompt",
            "continue_final_message",
            "tokenize",
            "sanitize_control_tokens",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "return_assistant_tokens_mask",
            "tokenizer_kwargs",
        ),
        "neat-align sets it",
    ),
}


def read_template_inputs(columns: Mapping[str, Any]) -> TemplateInputs:
    """What a row's columns give its chat template.

    Both may be JSON text, as data sets store them. A null inside stands for a field that this row
    does not have: Arrow gives every row the fields of all. Raises DataError.
    """
    tools, kwargs = (columns.get(name) for name in COLUMNS)
    if tools is None and kwargs is None:
        return NO_INPUTS
    return TemplateInputs(_read_tools(tools), read_kwargs(kwargs, "chat_template_kwargs"))


def read_kwargs(value: object, field: str) -> dict[str, Any]:
    """Variables for the chat template. Raises DataError; `field` is its name in messages."""
    value = _parsed(value, field)
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise DataError(
            f"{field} is {short(value)}; it must be an object with the variables that the chat "
            'template reads, such as {"enable_thinking": false}: correct it, or leave it out'
        )
    for name in value:
        if name in _RESERVED:
            raise DataError(
                f"{field} holds {name!r}, which is no variable for the chat template "
                f"({_RESERVED[name]}): take it out"
            )
    _check_json(value, field)
    return value


def with_template_kwargs(
    rows: Sequence[PromptRow], kwargs: Mapping[str, Any] | None
) -> list[PromptRow]:
    """The rows with these variables for their chat template; a row's own win."""
    if not kwargs:
        return list(rows)
    return [
        replace(row, template_inputs=joined_inputs(kwargs, row.template_inputs)) for row in rows
    ]


def joined_inputs(kwargs: Mapping[str, Any], inputs: TemplateInputs) -> TemplateInputs:
    """`inputs` with more variables; those that it has win."""
    return TemplateInputs(inputs.tools, {**kwargs, **inputs.kwargs})


def _read_tools(value: object) -> list[dict[str, Any]] | None:
    parsed = _parsed(value, "tools")
    if parsed is None:
        return None
    if not isinstance(parsed, list | tuple):
        raise DataError(
            f"tools is {short(parsed)}; it must be a list of JSON schemas, one a tool: correct "
            "it, or leave it out"
        )
    tools = [_read_tool(item, f"tools[{i}]") for i, item in enumerate(parsed)]
    # An empty list makes some templates (Llama's) write that there are tools.
    return tools or None


def _read_tool(value: object, at: str) -> dict[str, Any]:
    tool = _parsed(value, at)
    if callable(value):
        raise DataError(
            f"{at} is a function; give its schema: transformers.utils.get_json_schema makes it"
        )
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    names = [source.get("name") for source in (tool, function) if isinstance(source, dict)]
    kind = tool.get("type", "function") if isinstance(tool, dict) else None
    is_named = any(isinstance(name, str) and name for name in names)
    if not isinstance(tool, dict) or not (is_named or kind != "function"):
        raise DataError(
            f"{at} is {short(value)}; it must be a tool's JSON schema, such as "
            '{"type": "function", "function": {"name": …, "parameters": …}}: correct it'
        )
    _check_json(tool, at)
    return tool


def _parsed(value: object, field: str) -> object:
    """The value without nulls; of a text, what it holds as JSON."""
    if not isinstance(value, str):
        return without_nulls(value)
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{field} is the text {short(value)}, which is no JSON "
            f"({getattr(error, 'msg', error)}): correct it, or leave it out"
        ) from None


def without_nulls(value: Any) -> Any:
    """Plain data without the fields that are null."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(v) for v in value]
    return value


def _check_json(value: object, field: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{field} is no JSON ({error}): use texts, numbers, lists and objects"
        ) from None
