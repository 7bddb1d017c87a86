"""The policies of a run, once it is measured in which layout they score and how they sample."""

from __future__ import annotations

from accelerate import Accelerator

from neat_align.config import NEATConfig
from neat_align.prompts.rendering import eos_token_ids
from neat_align.prompts.rows import TemplateInputs
from neat_align.runs.ranks import Ranks
from neat_align.sampling.policies import Policies
from neat_align.trainer.first_process import found_by_first, hands_out_weights
from neat_align.trainer.sampler_setup import GivenSampler, sampler_maker
from neat_align.trainer.setup import (
    PolicySetup,
    TrainingData,
    autocast_dtype,
    first_prompts,
    layout_for,
    template_kwargs,
)
from neat_align.trainer.shared_reference import sharding_of


def set_up_policies(
    args: NEATConfig,
    setup: PolicySetup,
    data: TrainingData,
    accelerator: Accelerator,
    sampler: GivenSampler,
    ranks: Ranks,
) -> Policies:
    """The policies, once Trainer has made the accelerator. `sampler` is what the trainer was given.

    Raises ConfigError, and what a sampler of another engine raises.
    """
    hands_out_weights(args, accelerator)
    sharding = sharding_of(accelerator)
    said = "while it compared the model with itself"
    layout = found_by_first(args, lambda: layout_for(args, setup, data, sharding), said)
    dtype = autocast_dtype(args)
    policies = Policies(
        model=setup.model,
        reference=setup.reference,
        layout=layout,
        eos_token_ids=eos_token_ids(
            setup.tokenizer,
            setup.model,
            conversational=data.conversational,
            inputs=TemplateInputs(kwargs=template_kwargs(args)),
        ),
        pad_token_id=setup.tokenizer.pad_token_id,
        batch_size=args.generation_batch_size,
        autocast_dtype=dtype,
        copy_dtype=dtype if args.samples_from_copy else None,
        make_sampler=sampler_maker(args, setup, data, sampler, ranks),
        tolerance=args.sampler_tolerance,
    )
    prompts, said = first_prompts(setup, data), "while it tried how the model samples"
    ways = found_by_first(args, lambda: policies.settle_sampling(prompts), said)
    policies.known_way.way, policies.known_start_way.way = ways
    return policies
