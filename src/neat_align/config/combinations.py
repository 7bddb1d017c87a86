"""Combinations of a NEAT run's options: which is read only with which, and which cannot work.

An option's own limits stand beside it in `objective_options` (the loss's) or `neat_config`; a
constant here is named there as `only_with`.
"""

from __future__ import annotations

from neat_align.config.constraints import OnlyWith, Rule

OTHER_PROMPTS = (
    OnlyWith(
        "num_negative",
        "negative_source is other_prompts but num_negative is 0: remove it, or ask for negatives",
        none_of=(0,),
    ),
    OnlyWith(
        "rank_by",
        "negative_source is other_prompts and rank_by is reward: a good answer to another prompt "
        "may well have a high reward, so it would be no negative; set rank_by: origin_then_reward "
        "(or origin)",
        none_of=("reward",),
    ),
)
_PASSES = "data_passes is {c.data_passes:g}"
_ONE_OF_THEM = "and both say how long to train: leave one of them out"
DATA_PASSES = (
    OnlyWith(
        "num_train_epochs",
        f"{_PASSES} and num_train_epochs is {{c.num_train_epochs:g}}, {_ONE_OF_THEM}",
        one_of=(3.0,),  # the default
    ),
    OnlyWith(
        "max_steps",
        f"{_PASSES} and max_steps is {{c.max_steps}}, {_ONE_OF_THEM}",
        one_of=(-1,),
    ),
)
INITIAL_POLICY = (
    OnlyWith(
        "negative_source",
        "negative_policy is initial but negative_source is other_prompts: the current policy "
        "writes those; remove one",
        none_of=("other_prompts",),
    ),
    OnlyWith(
        "num_negative",
        "negative_policy is initial but num_negative is 0: remove it, or sample negatives",
        none_of=(0,),
    ),
)
CONTRAST_FROM = (
    OnlyWith(
        "num_plain",
        "contrast_from is branch but num_plain is 0: there is no plain answer to branch from; ask "
        "for one or more, or set contrast_from: prompt",
        none_of=(0,),
    ),
    OnlyWith(
        "negative_source",
        "contrast_from is branch and negative_source is other_prompts: an answer to another prompt "
        "shares no beginning with this one's; remove one",
        none_of=("other_prompts",),
    ),
    OnlyWith(
        "negative_policy",
        "contrast_from is branch and negative_policy is initial: the current policy would write a "
        "negative's beginning and the start policy the rest, and its log-probability would be "
        "neither's; remove one",
        none_of=("initial",),
    ),
)
PAIR_SELECTION = (
    OnlyWith(
        "ranking_loss",
        "pair_selection is set but ranking_loss is none: no pair is ranked; remove it",
        none_of=("none",),
    ),
)
HINGE_MARGIN = (
    OnlyWith(
        "ranking_loss",
        "hinge_margin is set but ranking_loss is {c.ranking_loss}: remove it, or use ranking_loss: "
        "hinge",
        one_of=("hinge",),
    ),
)
BETA = (
    OnlyWith(
        "ranking_loss",
        "beta is set but ranking_loss {c.ranking_loss} has none: remove it (the hinge's scale is "
        "hinge_margin)",
        none_of=("hinge", "none"),
    ),
)
TOKEN_WEIGHTS = (
    OnlyWith(
        "ranking_loss",
        "token_weight_scale is set but ranking_loss is none: no pair is ranked, so there is "
        "nothing to weigh; remove it",
        none_of=("none",),
    ),
    OnlyWith(
        "ranking_loss",
        "token_weight_scale is set but ranking_loss is kto: it has no winner and loser of a pair, "
        "which weigh their tokens oppositely, and its reference point is a KL, which has no "
        "weights; use ranking_loss: logistic or dpo, or remove it",
        none_of=("kto",),
    ),
)
TOKEN_WEIGHT_OPTION = (
    OnlyWith(
        "token_weight_scale",
        "token_weight_clip or token_weight_pairs is set but token_weight_scale is 0: remove it, or "
        "set token_weight_scale",
        none_of=(0,),
    ),
)
GAMMA = (
    OnlyWith(
        "ranking_loss",
        "gamma is set but ranking_loss is {c.ranking_loss}: only logistic has a target margin",
        one_of=("logistic",),
    ),
)
LM_TARGET = (
    OnlyWith(
        "lm_weight",
        "lm_on_bad_origins or lm_on_cut_completions is set but lm_weight is 0: there is no "
        "language-modelling target",
        none_of=(0,),
    ),
)
NEGATIVE_PENALTY = (
    OnlyWith(
        "num_negative",
        "negative_penalty is set but num_negative is 0: there would be nothing to penalise",
        none_of=(0,),
    ),
    OnlyWith(
        "pair_selection",
        "negative_penalty looks at whole groups and pair_selection: best_worst trains on two of "
        "each: use one of the two",
        one_of=("all",),
    ),
)
NPO_BETA = (
    OnlyWith(
        "negative_penalty",
        "npo_beta is set but negative_penalty is {c.negative_penalty}: remove it, or use "
        "negative_penalty: npo",
        one_of=("npo",),
    ),
)
DISTIL = (
    OnlyWith(
        "num_plain",
        "distil_weight is {c.distil_weight:g} but num_plain is 0: plain answers are what is "
        "distilled on; sample one or more",
        none_of=(0,),
    ),
)
DISTIL_OPTION = (
    OnlyWith(
        "distil_weight",
        "an option of contrast distillation (distil_…) is set but distil_weight is 0: remove it, "
        "or set distil_weight",
        none_of=(0,),
    ),
)
DISTIL_INSTRUCTED = (
    OnlyWith(
        "distil_toward",
        "distil_pairs or distil_clip is set but distil_toward is sharpened, which reads no "
        "instruction: remove it",
        none_of=("sharpened",),
    ),
)
_VLLM = "vllm_server, or another option of vLLM's (vllm_...), is set but sampler is {c.sampler}: "
VLLM = (OnlyWith("sampler", _VLLM + "remove it, or set sampler: vllm", one_of=("vllm",)),)
VLLM_FOLDER = (
    *VLLM,
    OnlyWith(
        "vllm_sync_backend",
        "vllm_sync_folder is set but vllm_sync_backend is nccl, which writes no weights: remove "
        "one of them",
        one_of=("folder",),
    ),
)
GENERATION_COPY = (
    OnlyWith(
        "sampler",
        "generation_copy is {c.generation_copy} but sampler is {c.sampler}, which samples from "
        "weights of its own: remove it",
        one_of=("transformers",),
    ),
)
AGGREGATION = (
    OnlyWith(
        "rank_by",
        "multi_objective_aggregation is normalize_then_sum and rank_by is origin, which looks at "
        "no reward: remove it, or rank by reward",
        none_of=("origin",),
    ),
)
REWARD_BITS = (
    OnlyWith(
        "reward_load_in_4bit",
        "reward_load_in_4bit and reward_load_in_8bit are both true: a weight is held one way; "
        "remove one",
        none_of=(True,),
    ),
)
MAX_KL = (
    OnlyWith(
        "drift_prompts",
        "max_kl is set but drift_prompts is 0: nothing would measure the KL; set drift_prompts to "
        "8 or more",
        none_of=(0,),
    ),
)

# What no single option can tell.
RULES = (
    Rule(
        lambda c: "\0" in str(c.output_dir),
        "output_dir is {c.output_dir!r}, which holds a NUL character, and no path can: remove it",
    ),
    Rule(
        lambda c: c.sampler == "vllm" and not c.vllm_server,
        "sampler is vllm and vllm_server is missing: start a server and give its URL "
        "(vllm_server: http://127.0.0.1:8000)",
    ),
    Rule(
        lambda c: c.num_generations == 0,
        "num_positive, num_negative and num_plain are all 0: nothing would be sampled; set at "
        "least one",
    ),
    Rule(
        lambda c: c.needs_pairs and c.num_generations == 1 and not c.use_human_completions,
        "num_positive, num_negative and num_plain add up to 1 and use_human_completions is false: "
        "one completion a prompt leaves nothing to rank; ask for two or more",
    ),
    Rule(
        lambda c: c.distil_weight == 0 and not c.needs_pairs,
        "ranking_loss is none, lm_weight is 0 and distil_weight is 0: nothing would be learned; "
        "set one of them",
    ),
    Rule(
        lambda c: not c.needs_pairs and c.kl_weight == 0 and c.num_positive + c.num_negative > 0,
        "num_positive is {c.num_positive} and num_negative is {c.num_negative}, but ranking_loss "
        "is none and lm_weight and kl_weight are 0: nothing would read these answers, since "
        "contrast distillation reads plain ones; set both to 0",
    ),
    Rule(
        lambda c: c.distil_weight > 0 and c.distil_alpha == 0,
        "distil_alpha is 0: the policy would be taught what it was at the start; set one that is "
        "not 0, or distil_weight: 0",
    ),
    Rule(
        lambda c: c.distil_answers == "lower_half" and c.num_plain < 2,
        "distil_answers is lower_half and num_plain is {c.num_plain}: one answer has no lower "
        "half; sample two or more",
    ),
    Rule(
        lambda c: c.contrast_from == "branch" and c.num_positive + c.num_negative == 0,
        "contrast_from is branch but num_positive and num_negative are 0: nothing would branch; "
        "ask for one of them, or set contrast_from: prompt",
    ),
    Rule(
        lambda c: (c.negative_penalty == "none") != (c.negative_weight == 0),
        "negative_penalty is {c.negative_penalty} and negative_weight is {c.negative_weight}: set "
        "both, or neither",
    ),
)
