"""Ways to let K completions share their prompt in training, timed on the same tokens.

Forward and backward pass.

  python benchmarks/attention_forms.py --json OUT

pieces  one row; attention in its two dense pieces (what neat_align uses; on a CPU as products)
kernel  the same pieces by torch's scaled-dot-product attention (CPU only: elsewhere pieces is that)
mask    one row; scaled-dot-product attention under a boolean mask over the whole row
flex    one row; FlexAttention with a block mask, compiled (GPU only)
cache   the prompt first, its keys and values then repeated for a batch of completions
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import harness
import torch
from torch import Tensor
from train_step import gradient_step, make_ids

from neat_align.modeling import shared_prefix
from neat_align.modeling.chunked_head import LogitTail, chosen_logprobs, chunk_rows
from neat_align.modeling.logprobs import completion_logprobs
from neat_align.modeling.packing import PADDING_POSITION, PackedRows, pack_rows
from neat_align.modeling.precision import autocast

# Tokens of the prompt, tokens of a completion, completions.
POINTS = ((64, 64, 4), (256, 64, 8), (512, 128, 8))


def head(model: Any, states: Tensor, rows: PackedRows) -> Tensor:
    """The same chunked head for every form."""
    ids = rows.completion_ids[rows.completion_mask]
    chunk = chunk_rows(model.config.vocab_size, states.device)
    logprobs = chosen_logprobs(states, model.lm_head.weight, None, ids, LogitTail(), chunk)
    return logprobs.view_as(rows.completion_ids)


def segments_of(rows: PackedRows) -> Tensor:
    """0 for the prompt, 1 … K for the completions, at every place of the row."""
    out = torch.zeros(rows.input_ids.shape[1], dtype=torch.long, device=rows.input_ids.device)
    fed = rows.layout.key_position[:, rows.layout.prompt_index.shape[1] :] < PADDING_POSITION
    for k, (index, mask) in enumerate(zip(rows.layout.completion_index, fed, strict=True), start=1):
        out[index[mask]] = k
    return out


def by_mask(model: Any, rows: PackedRows) -> Tensor:
    segment, position = segments_of(rows), rows.position_ids[0]
    mask = ((segment == segment[:, None]) | (segment == 0)) & (position <= position[:, None])
    states = model.model(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    return head(model, states[rows.read_at], rows)


def by_kernel(model: Any, rows: PackedRows) -> Tensor:
    with patch.object(shared_prefix, "by_products", return_value=False):
        return completion_logprobs(model, rows)


def by_flex(model: Any, rows: PackedRows) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    segment, position = segments_of(rows), rows.position_ids[0]

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((segment[q] == segment[k]) | (segment[k] == 0)) & (position[k] <= position[q])

    n = rows.input_ids.shape[1]
    mask = create_block_mask(visible, 1, None, n, n, device=rows.input_ids.device)
    states = model.model(
        input_ids=rows.input_ids,
        position_ids=rows.position_ids,
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state[0]
    return head(model, states[rows.read_at], rows)


def by_cache(model: Any, rows: PackedRows) -> Tensor:
    from transformers import DynamicCache

    k, p = rows.completion_ids.shape[0], rows.layout.prompt_index.shape[1]
    cache = DynamicCache(config=model.config)
    prompt = model.model(
        input_ids=rows.input_ids[:, :p], past_key_values=cache, use_cache=True
    ).last_hidden_state
    cache.batch_repeat_interleave(k)
    own = model.model(
        input_ids=rows.completion_ids[:, :-1], past_key_values=cache, use_cache=True
    ).last_hidden_state
    states = torch.cat([prompt[:, -1:].expand(k, -1, -1), own], dim=1)
    return head(model, states.flatten(0, 1), rows)


Form: TypeAlias = Callable[[Any, PackedRows], Tensor]


def measured(
    model: Any, forms: dict[str, Form], point: tuple[int, int, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Median seconds of each form at one (P, R, K), and how far their log-probabilities differ."""
    p, r, k = point
    prompt, completions = make_ids(p, r, k)
    rows = pack_rows([prompt], [completions]).to(harness.device())
    logprobs_of: dict[str, Tensor] = {}

    def step(name: str) -> None:
        model.config._attn_implementation = "flex_attention" if name == "flex" else "sdpa"
        model.zero_grad(set_to_none=False)

        def logprobs() -> Tensor:
            with autocast(harness.device().type, harness.DTYPES[args.dtype]):
                logprobs_of[name] = forms[name](model, rows)
            return logprobs_of[name]

        gradient_step(logprobs)

    seconds = harness.in_turn({name: partial(step, name) for name in forms}, args.repeats)
    ours = logprobs_of["pieces"]
    return {
        "prompt": p,
        "completion": r,
        "k": k,
        "seconds": {name: harness.spread(values)["median"] for name, values in seconds.items()},
        "max_logprob_difference": max(
            float((other - ours).detach().abs().max()) for other in logprobs_of.values()
        ),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", choices=list(harness.DTYPES), default="fp32")
    args = parser.parse_args()
    model = harness.load_model(args.model).to(harness.device()).train()
    forms: dict[str, Form] = {
        "pieces": completion_logprobs,
        "mask": by_mask,
        "cache": by_cache,
    }
    forms |= {"kernel": by_kernel} if harness.device().type == "cpu" else {"flex": by_flex}
    settings = [measured(model, forms, point, args) for point in POINTS]
    table = []
    for m in settings:
        ours = m["seconds"]["pieces"]
        times = [f"{seconds:.3f} ({seconds / ours:.2f}x)" for seconds in m["seconds"].values()]
        point = f"{m['prompt']} + {m['k']} x {m['completion']}"
        table.append([point, *times, f"{m['max_logprob_difference']:.0e}"])
    title = f"seconds, forward and backward, {args.dtype}"
    harness.show(title, ["P + K x R", *forms, "differ by, nats"], table)
    result = {
        "dtype": args.dtype,
        "model": args.model,
        "device": harness.device().type,
        "settings": settings,
    }
    harness.save(args.json, result)


if __name__ == "__main__":
    main()
