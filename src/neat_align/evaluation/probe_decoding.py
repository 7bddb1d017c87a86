"""What decoding from the contrast of a bank's pairs reaches: what there is to learn from it.

The prompts are answered with the random numbers of their plain answers, from the distribution that
distillation learns; so the effect, its KL and its cost in variety bound what that training reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neat_align.errors import ConfigError
from neat_align.evaluation.probe_params import (
    PROBE_ROUND,
    DecodingParams,
    ProbeParams,
    ProbeTools,
)
from neat_align.evaluation.probe_summary import DecodingProbe, summarise_decoding
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair
from neat_align.prompts.rows import PromptRow
from neat_align.prompts.seeds import draw_pairs
from neat_align.rewards.scoring import score_answers
from neat_align.rounds.completions import Completion
from neat_align.rounds.params import Progress, progress_counter
from neat_align.sampling.contrast_decoding import Contrast
from neat_align.sampling.contrast_sampler import ContrastSample, contexts_of
from neat_align.sampling.protocol import SampleRequest

# Answers whose log-probabilities are computed at once.
LIKELIHOOD_ANSWERS = 16


def probe_decoding(
    rows: Sequence[PromptRow],
    bank: InstructionBank,
    requests: Sequence[Sequence[SampleRequest]],
    plain: Sequence[Sequence[Completion]],
    params: ProbeParams,
    tools: ProbeTools,
    progress: Progress | None = None,
) -> list[DecodingProbe]:
    """The numbers of every placement and alpha, in that order.

    `requests` are those of the plain answers, `plain` those answers with their rewards; each has a
    list a row. Raises ConfigError where `params` or `tools` have nothing to decode with.
    """
    decoding = params.decoding
    if decoding is None or tools.decoder is None or tools.rewards is None:
        raise ConfigError("decoding from the contrast needs its parameters, a decoder and a reward")
    pairs = [drawn_pairs(bank, decoding, row, params.seed) for row in rows]
    settings = [(p, alpha) for p in params.placements for alpha in decoding.alphas]
    total = len(settings) * sum(map(len, requests))
    count = progress_counter(progress, "decode", total)
    flat = [q for mine in requests for q in mine]
    drawn: list[list[ContrastSample]] = []
    for placement, alpha in settings:
        contexts = contexts_of(tools.tokenizer, rows, pairs, placement)
        sampler = tools.decoder(contexts, Contrast(alpha, decoding.min_p))
        drawn.append(sampler.draw(flat, params.sampling, progress=count))
    answers = _scored(rows, flat, drawn, tools)
    return [
        summarise_decoding(
            plain,
            _by_row(completions, requests),
            [sample.kl for sample in samples],
            [[pair.positive for pair in mine] for mine in pairs],
            placement,
            alpha,
            seed=params.seed,
        )
        for (placement, alpha), samples, completions in zip(settings, drawn, answers, strict=True)
    ]


def drawn_pairs(
    bank: InstructionBank, decoding: DecodingParams, row: PromptRow, seed: int
) -> tuple[InstructionPair, ...]:
    """The pairs whose log-ratios are averaged for a row."""
    return draw_pairs(
        bank, decoding.num_pairs, run_seed=seed, round_index=PROBE_ROUND, prompt_id=row.id
    )


def _scored(
    rows: Sequence[PromptRow],
    requests: Sequence[SampleRequest],
    drawn: Sequence[Sequence[ContrastSample]],
    tools: ProbeTools,
) -> list[list[Completion]]:
    """The answers with their rewards and their log-probabilities under the plain prompt."""
    assert tools.rewards is not None
    each = len(requests) // len(rows)
    flat = [sample for samples in drawn for sample in samples]
    asked = [q for _ in drawn for q in requests]
    texts = [tools.tokenizer.decode(s.token_ids, skip_special_tokens=True).strip() for s in flat]
    tokens = [sample.token_ids for sample in flat]
    logprobs: list[tuple[float, ...]] = []
    for start in range(0, len(flat), LIKELIHOOD_ANSWERS):
        part = slice(start, start + LIKELIHOOD_ANSWERS)
        logprobs += tools.logprobs([q.prompt_ids for q in asked[part]], tokens[part])
    of_row = [row for _ in drawn for row in rows for _ in range(each)]
    scored = score_answers(of_row, texts, tokens, tools.rewards, tools.on_bad_row)
    completions = [
        Completion(
            origin="plain",
            index=i % each,
            text=text,
            token_ids=sample.token_ids,
            finish_reason=sample.finish_reason,
            seed=request.seed,
            sampling_logprob=sample.logprob,
            policy_logprobs=logps,
        )
        for i, (request, sample, text, logps) in enumerate(
            zip(asked, flat, texts, logprobs, strict=True)
        )
    ]
    with_rewards = [
        replace(c, reward=reward, reward_components=parts)
        for c, reward, parts in zip(completions, scored.rewards, scored.components, strict=True)
    ]
    n = len(requests)
    return [with_rewards[i : i + n] for i in range(0, len(with_rewards), n)]


def _by_row(
    completions: Sequence[Completion], requests: Sequence[Sequence[SampleRequest]]
) -> list[list[Completion]]:
    left = iter(completions)
    return [[next(left) for _ in mine] for mine in requests]
