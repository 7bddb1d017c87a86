"""Sampling from a transformers model, each completion from its own random numbers (`draw`).

Requests are sorted by length and drawn `batch_size` beside each other, left-padded; a model whose
numbers are others then gets prompts of one length (`batch_check`). A prompt that several
completions share goes through the model once; its keys are then copied to each of them, or kept
once for all (`shared_rows`, on a CPU). A completion that has ended gives its place to the next
request (`drawing`). transformers' own `generate` does neither (and its continuous batching draws
from one random stream for all), so the decode loop is written out here; a model that keeps more
than keys and values is drawn with `generate`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from transformers import LogitsProcessorList, PreTrainedModel

from neat_align.modeling.known_padding import masks_from
from neat_align.modeling.lockstep import is_sharded, lockstep
from neat_align.modeling.outputs import plain_outputs
from neat_align.modeling.precision import casting_once, inference
from neat_align.modeling.requirements import context_of
from neat_align.sampling.batch_check import PLACES, KnownWay, SamplingWay, choose_way
from neat_align.sampling.by_generate import DrawnToken, greedy, no_own_generation_config
from neat_align.sampling.decode_check import fast_decoding
from neat_align.sampling.draw import check_drawn, uniforms
from neat_align.sampling.drawing import (
    Drawing,
    Drawn,
    RowReader,
    Waiting,
    draw_tokens,
)
from neat_align.sampling.protocol import (
    Finished,
    FinishReason,
    Sample,
    SampleRequest,
    SamplingParams,
)
from neat_align.sampling.row_kinds import keeps_keys, read_rows
from neat_align.sampling.shares import D, Done, DrawShare, Told, in_batches
from neat_align.sampling.token_rows import CachedRows, RecomputedRows, TokenRows, left_padded

logger = logging.getLogger(__name__)
# Tokens between two looks at which completions have ended. On a GPU the CPU waits at each look for
# all that it has asked for; on a CPU there is nothing to wait for.
LOOK_EVERY = 8


@dataclass
class BatchLimit:
    """How many completions fit into memory at once; None until memory ran out.

    `keeps_casts` says whether there is room for the casts of frozen weights, too.
    """

    limit: int | None = None
    keeps_casts: bool = True


@dataclass(frozen=True)
class TransformersSampler:
    """A `Sampler` over a transformers causal language model on any device.

    `eos_token_ids` end a completion. `autocast_dtype` computes in that type; None computes in the
    weights' own. When memory runs out the batch is halved, said once, and drawn again; samplers
    that share a `batch_limit` remember it. Which completions have ended is looked at once in
    `look_every` tokens (None: 1 on a CPU, else 8), which changes how long they are carried along
    and none of their tokens. Which prompts are drawn together is measured before the first draw
    (`batch_check`); samplers of one model may share `known_way`.
    """

    model: PreTrainedModel | torch.nn.Module
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    batch_size: int = 64
    autocast_dtype: torch.dtype | None = None
    batch_limit: BatchLimit = field(default_factory=BatchLimit)
    look_every: int | None = None
    known_way: KnownWay = field(default_factory=KnownWay)

    @property
    def hands_over(self) -> bool:
        """Whether a call may be interrupted: not on a CPU, where an interrupted run goes on to the
        bit. What is beside a completion decides how its logits are rounded, so that the rest of a
        call is not drawn to the bit as it would have been.
        """
        return next(self.model.parameters()).device.type != "cpu"

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        """One `Sample` a request, in the order of the requests.

        Where ranks hold parts of the model, each of them calls this with its share, which may be
        empty. Raises ConfigError for a model that no way of sampling draws from rightly.
        """
        with lockstep(self.model):
            if not requests:
                return []
            way = self.settle([r.prompt_ids for r in requests])
            return self._sample_in(way, requests, params, progress, finished)

    def settle(self, prompts: Sequence[tuple[int, ...]]) -> SamplingWay:
        """Which prompts are drawn together: measured once, on tiny rows from tokens of `prompts`.

        Raises ConfigError.
        """
        if self.known_way.way is None:
            endless = replace(self, eos_token_ids=(), batch_size=PLACES)
            self.known_way.way = choose_way(
                self.model, endless._sample_in, prompts, self.autocast_dtype
            )
        return self.known_way.way

    def _sample_in(
        self,
        way: SamplingWay,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        progress: Callable[[int], None] | None = None,
        finished: Finished | None = None,
    ) -> list[Sample]:
        # Equal prompts stand together, so that they meet in a batch.
        order = sorted(
            range(len(requests)),
            key=lambda i: (-len(requests[i].prompt_ids), requests[i].prompt_ids),
        )
        lengths = groupby(order, key=lambda i: len(requests[i].prompt_ids))
        groups = [order] if way == "together" else [list(group) for _, group in lengths]
        cached = keeps_keys(self.model) and way != "whole"
        draw_share = in_batches(self._generate)
        if cached and way == "together":
            draw_share = self._refilled
        elif cached:
            draw_share = in_batches(partial(self._decode, reader=self._cached(padded=False)))
        # `generate` calls the model below an adapter, where no rank could wait for the others.
        elif way == "whole" or is_sharded(self.model):
            draw_share = in_batches(partial(self._decode, reader=self._recomputed()))
        size = 1 if way == "one_row" else self.batch_size
        sampler = replace(self, batch_size=size)
        told = Told(progress, finished)
        return sampler.in_groups(groups, draw_share, requests, params, told, fast=cached)

    def in_groups(
        self,
        groups: Sequence[Sequence[int]],
        draw_share: DrawShare[D],
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        told: Told,
        *,
        fast: bool,
    ) -> list[D]:
        """What `draw_share` draws of each request, in the order of the requests.

        `groups` are indices of requests that may be drawn together, `batch_size` at once or as many
        as memory has room for. `fast` decodes with the fastest attention that agrees, where keys
        are kept.
        """
        samples: dict[int, D] = {}
        with (
            inference(self.model, self.autocast_dtype),
            plain_outputs(self.model),
            self._casts() as casts,
            fast_decoding(self.model, self.known_way) if fast else contextlib.nullcontext(),
        ):
            for group in groups:
                while left := [i for i in group if i not in samples]:
                    done = told.and_kept(samples, left)
                    places = min(self.batch_size, self.batch_limit.limit or len(left), len(left))
                    draw = partial(draw_share, [requests[i] for i in left], params, places, done)
                    if not self._in_memory(draw, places):
                        casts.close()
                        # And on with fewer at once, or with nothing kept beside the weights.
        return [samples[i] for i in range(len(requests))]

    def _in_memory(self, draw: Callable[[], None], places: int) -> bool:
        """Whether all was drawn: False when memory ran out and less of it will be asked for.

        First the casts of frozen weights are given up, then half of the places. A completion alone
        raises as it did.
        """
        try:
            draw()
            return True
        except torch.OutOfMemoryError as error:
            if is_sharded(self.model):
                error.add_note(
                    "The batch is not halved where processes share a model's weights, since the "
                    "others wait in the pass that ran out of memory: lower generation_batch_size"
                )
                raise
            if self._keeps_casts:
                self.batch_limit.keeps_casts = False
            elif places == 1:
                raise
            else:
                self._halve(places)
        # Outside of the except block: the exception would keep the failed batch's tensors alive.
        torch.clear_autocast_cache()
        clear_device_cache(garbage_collection=True)
        return False

    @property
    def _keeps_casts(self) -> bool:
        return self.autocast_dtype is not None and self.batch_limit.keeps_casts

    def _casts(self) -> contextlib.ExitStack:
        """Casts frozen weights once, where there is room, until it is closed."""
        casts = contextlib.ExitStack()
        if self._keeps_casts:
            casts.enter_context(casting_once(self.model))
        return casts

    def _halve(self, requests: int) -> None:
        """From now on half as many at once."""
        if self.batch_limit.limit is None:
            logger.warning(
                "memory ran out while %d completions were sampled at once: from now on fewer are. "
                "generation_batch_size sets how many",
                requests,
            )
        self.batch_limit.limit = requests // 2

    def looks(self) -> int:
        """After how many tokens it is looked at which completions have ended."""
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        return self.look_every or (1 if on_cpu else LOOK_EVERY)

    def _refilled(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        places: int,
        done: Done[Sample],
    ) -> None:
        """With a cache of keys and values; places are filled again when completions end."""

        def finished(drawn: Sequence[Drawn]) -> None:
            done([d.request for d in drawn], [self.sample_of(d, requests, params) for d in drawn])

        self.draw(requests, params, places, self._cached(), finished)

    def _decode(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        reader: RowReader | None = None,
    ) -> list[Sample]:
        """All at once, read by `reader` (None: with a cache, padded)."""
        samples: dict[int, Sample] = {}

        def finished(drawn: Sequence[Drawn]) -> None:
            samples.update({d.request: self.sample_of(d, requests, params) for d in drawn})

        self.draw(requests, params, len(requests), reader or self._cached(), finished)
        return [samples[i] for i in range(len(requests))]

    def _cached(self, *, padded: bool = True) -> RowReader:
        """One row a request, kept as keys and values; not `padded`: of one length, not masked."""

        def read(rows: Sequence[tuple[int, ...]]) -> TokenRows:
            if padded:
                return read_rows(self.model, rows, self.pad_token_id, "together")
            return CachedRows(self.model, rows, self.pad_token_id, padded=False)

        return RowReader(lambda request: [request.prompt_ids], read)

    def _recomputed(self) -> RowReader:
        """One row a request, read anew for every token, as it will be scored; nothing is kept."""
        return RowReader(
            lambda request: [request.prompt_ids],
            lambda rows: RecomputedRows(self.model, rows, alone=False),
        )

    def draw(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        places: int,
        reader: RowReader,
        finished: Callable[[list[Drawn]], None],
    ) -> None:
        """Draw the tokens of requests, so many at once, and tell of those that have ended."""
        device = next(self.model.parameters()).device
        ends = torch.tensor(self.eos_token_ids, dtype=torch.long, device=device)
        draw_tokens(
            Waiting(requests, places),
            Drawing(ends, params),
            reader,
            look_every=self.looks(),
            finished=finished,
        )

    def sample_of(
        self, drawn: Drawn, requests: Sequence[SampleRequest], params: SamplingParams
    ) -> Sample:
        """What was drawn, up to its end token and its limit. Raises CollapseError."""
        limit = requests[drawn.request].limit(params)
        return self._sample(drawn.tokens[:limit], drawn.logprobs[:limit])

    def _generate(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[Sample]:
        """With `generate`, which draws all rows of a call to one length.

        Those that would pass the model's context so are drawn in a call of their own.
        """
        context, most = context_of(self.model), max(r.limit(params) for r in requests)
        drawn: dict[int, Sample] = {}
        apart: list[int] = []
        for i, request in enumerate(requests):
            fits = context is None or len(request.prompt_ids) + most <= context
            if not fits and request.limit(params) < most:
                apart.append(i)
        together = [i for i in range(len(requests)) if i not in apart]
        for share, draw_share in (
            (together, self._generate_to_one_length),
            (apart, self._generate),
        ):
            if share:
                samples = draw_share([requests[i] for i in share], params)
                drawn.update(zip(share, samples, strict=True))
        return [drawn[i] for i in range(len(requests))]

    def _generate_to_one_length(
        self, requests: Sequence[SampleRequest], params: SamplingParams
    ) -> list[Sample]:
        device = next(self.model.parameters()).device
        input_ids, mask = left_padded([r.prompt_ids for r in requests], self.pad_token_id, device)
        processor = DrawnToken(
            uniforms([r.seed for r in requests], params.max_new_tokens, device),
            params,
            input_ids.shape[1],
        )
        padded = len({len(r.prompt_ids) for r in requests}) > 1
        longest = replace(params, max_new_tokens=max(r.limit(params) for r in requests))
        with no_own_generation_config(self.model), masks_from(padded=padded):
            output = cast("Any", self.model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=greedy(longest, self.eos_token_ids, self.pad_token_id),
                logits_processor=LogitsProcessorList([processor]),
            )
        logprobs = torch.stack(processor.logprobs, dim=1).tolist()
        tokens = output[:, input_ids.shape[1] :].tolist()
        limits = [r.limit(params) for r in requests]
        drawn = zip(tokens, logprobs, limits, strict=True)
        return [self._sample(t[:limit], lp[:limit]) for t, lp, limit in drawn]

    def _sample(self, tokens: list[int], logprobs: list[float]) -> Sample:
        end = next((i for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        length = len(tokens) if end is None else end + 1
        check_drawn(logprobs[:length])
        finish_reason: FinishReason = "length" if end is None else "stop"
        return Sample(tuple(tokens[:length]), finish_reason, sum(logprobs[:length]))
