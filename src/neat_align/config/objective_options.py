"""Options of a NEAT run's loss: which terms it has, and how each is computed."""

from __future__ import annotations

from dataclasses import dataclass

from neat_align.config import combinations
from neat_align.config.constraints import option

RANKING_LOSSES = ("hinge", "logistic", "listwise", "dpo", "kto", "none")
# Those that look at log-ratios to the start policy.
LOG_RATIO_LOSSES = ("dpo", "kto")
NEGATIVE_PENALTIES = ("none", "unlikelihood", "npo")
DIVERGENCES = ("reverse", "forward", "js")
CONTRASTS = ("contrast", "positive", "sharpened")


@dataclass
class ObjectiveOptions:
    """Which terms the loss has, and how each is computed."""

    # ---- objective ----
    ranking_loss: str = option(
        "logistic",
        "hinge (RRHF, SLiC), logistic (SimPO's form), listwise (PRO), dpo, kto, or none (the LM "
        "loss alone, RAFT, or contrast distillation alone).",
        choices=RANKING_LOSSES,
    )
    pair_selection: str = option(
        "all",
        "Which pairs of a group are ranked: `all`, or `best_worst`, the best against the worst "
        "(DPO's).",
        choices=("all", "best_worst"),
        only_with=combinations.PAIR_SELECTION,
    )
    hinge_margin: float | None = option(
        None,
        "Margin m of the hinge, in nats per token (nats when length_power is 0). Only with hinge; "
        "0 when unset.",
        only_with=combinations.HINGE_MARGIN,
    )
    beta: float | None = option(
        None,
        "Scale of log-probability differences in logistic, listwise, dpo and kto. Unset: 2, 1, and "
        "2 for the last two (0.1 if length_power is 0).",
        gt=0,
        only_with=combinations.BETA,
    )
    gamma: float | None = option(
        None,
        "Target margin inside the sigmoid of the logistic loss (SimPO's gamma). Only with "
        "logistic; 0 when unset.",
        only_with=combinations.GAMMA,
    )
    length_power: float = option(
        1.0,
        "Scores divide the summed log-probability by length to this power: 1 is the mean, 0 the "
        "sum.",
        ge=0,
    )
    token_weight_scale: float = option(
        0.0,
        "Weigh the tokens of a ranked pair by the contrast e of the instructions, log p(+)/p(-) of "
        "the start policy: a winner's by exp(scale e), a loser's by exp(-scale e) (TIS-DPO). 0 is "
        "off, a negative one weighs the other way.",
        ge=-5,
        le=5,
        only_with=combinations.TOKEN_WEIGHTS,
    )
    token_weight_clip: float = option(
        1.5,
        "Keep the contrast that weighs a token within this many nats.",
        gt=0,
        le=10,
        only_with=combinations.TOKEN_WEIGHT_OPTION,
    )
    token_weight_pairs: int = option(
        1,
        "Instruction pairs of the bank whose contrasts are averaged; all of them where the bank "
        "has fewer. Each is two passes of the start policy over a round's answers.",
        ge=1,
        only_with=combinations.TOKEN_WEIGHT_OPTION,
    )
    pair_reduction: str = option(
        "mean",
        "`mean` over a group's pairs, or `sum` (RRHF's form).",
        choices=("mean", "sum"),
    )
    lm_weight: float = option(
        0.05, "Weight of the language-modelling loss on the best completion.", ge=0
    )
    lm_on_bad_origins: bool = option(
        False,
        "Let a negative or rejected completion be the language-modelling target when it is the "
        "best.",
        only_with=combinations.LM_TARGET,
    )
    lm_on_cut_completions: bool = option(
        False,
        "Let a completion that was cut at max_completion_length be the language-modelling target, "
        "without an end of turn. Otherwise the target must have ended by itself, which favours "
        "short answers where most are cut.",
        only_with=combinations.LM_TARGET,
    )
    negative_penalty: str = option(
        "none",
        "Bounded penalty on negatives rewarded below the group's median: none, unlikelihood, or "
        "npo.",
        choices=NEGATIVE_PENALTIES,
        only_with=combinations.NEGATIVE_PENALTY,
    )
    negative_weight: float = option(
        0.0, "Weight of the negative penalty; above 0 exactly when there is one.", ge=0
    )
    npo_beta: float | None = option(
        None,
        "Inverse temperature of the npo penalty (2404.05868). Only with npo. Unset: 0.1 on sums, 1 "
        "on means.",
        gt=0,
        only_with=combinations.NPO_BETA,
    )
    kl_weight: float = option(
        1.0,
        "Weight of the KL term: k3 estimate to the start policy on the group's own tokens, nats "
        "per token.",
        ge=0,
    )

    # ---- contrast distillation ----
    distil_weight: float = option(
        0.0,
        "Weight of contrast distillation: at every token of plain answers the KL between the "
        "policy and the start policy moved by the contrast of the instructions; nats per token.",
        ge=0,
        only_with=combinations.DISTIL,
    )
    distil_alpha: float = option(
        0.5,
        "How far the contrast moves the start policy: the power of p(+)/p(-). A negative one moves "
        "it the other way.",
        only_with=combinations.DISTIL_OPTION,
    )
    distil_toward: str = option(
        "contrast",
        "What moves the start policy: `contrast`, p(+)/p(-); `positive`, p(+)/p(plain), the "
        "positive instruction alone; `sharpened`, its own probabilities and no instruction (a "
        "control).",
        choices=CONTRASTS,
        only_with=combinations.DISTIL_OPTION,
    )
    distil_pairs: int = option(
        1,
        "Instruction pairs of the bank whose log-ratios are averaged. Each is two passes of the "
        "start policy over the answers.",
        ge=1,
        only_with=(*combinations.DISTIL_OPTION, *combinations.DISTIL_INSTRUCTED),
    )
    distil_min_p: float = option(
        0.05,
        "Only tokens with at least this share of the start policy's largest probability are "
        "moved; 0 moves all.",
        ge=0,
        lt=1,
        only_with=combinations.DISTIL_OPTION,
    )
    distil_threshold: float = option(
        0.0,
        "Bring the log-ratio this many nats nearer to 0 (it is centred first): tokens in which the "
        "instructions hardly differ stay as they were.",
        ge=0,
        only_with=combinations.DISTIL_OPTION,
    )
    distil_raise_only: bool = option(
        False,
        "Raise the tokens that the contrast favours and push none down: a log-ratio below its mean "
        "counts as the mean.",
        only_with=combinations.DISTIL_OPTION,
    )
    distil_clip: float | None = option(
        None,
        "Keep each pair's log-ratio within this many nats.",
        gt=0,
        only_with=(*combinations.DISTIL_OPTION, *combinations.DISTIL_INSTRUCTED),
    )
    distil_max_kl: float | None = option(
        None,
        "Lower distil_alpha for a prompt until what it is taught is about this far from the start "
        "policy, in nats per token.",
        gt=0,
        only_with=combinations.DISTIL_OPTION,
    )
    distil_divergence: str = option(
        "reverse",
        "`reverse`, KL(policy || teacher); `forward`, KL(teacher || policy); or `js`, "
        "Jensen-Shannon.",
        choices=DIVERGENCES,
        only_with=combinations.DISTIL_OPTION,
    )
    distil_teacher: str = option(
        "start",
        "Whose contrast it is: that of the `start` policy, or of the `current` one.",
        choices=("start", "current"),
        only_with=combinations.DISTIL_OPTION,
    )
    distil_answers: str = option(
        "all",
        "Which plain answers are distilled: `all`, or the `lower_half` of each group's plain "
        "answers by reward.",
        choices=("all", "lower_half"),
        only_with=combinations.DISTIL_OPTION,
    )
    distil_first: float = option(
        1.0,
        "The first part of each answer's tokens that is distilled; 1 is all of them.",
        gt=0,
        le=1,
        only_with=combinations.DISTIL_OPTION,
    )

    @property
    def needs_pairs(self) -> bool:
        """Whether a term of the loss compares answers: the ranking loss, the choice of the LM
        loss's target, the negative penalty. Contrast distillation does not.
        """
        return self.ranking_loss != "none" or self.lm_weight > 0 or self.negative_weight > 0

    @property
    def contrast_pairs(self) -> int:
        """Instruction pairs under which a round's groups keep their prompts: as many as whoever
        reads most of them.
        """
        return max(self.taught_pairs, self.weighing_pairs)

    @property
    def taught_pairs(self) -> int:
        """Instruction pairs that contrast distillation reads."""
        reads = self.distil_weight > 0 and self.distil_toward != "sharpened"
        return self.distil_pairs if reads else 0

    @property
    def weighing_pairs(self) -> int:
        """Instruction pairs whose contrast weighs tokens."""
        return self.token_weight_pairs if self.token_weight_scale else 0

    @property
    def needs_reference(self) -> bool:
        """Whether the objective needs the start policy's log-probabilities."""
        log_ratios = self.ranking_loss in LOG_RATIO_LOSSES
        return log_ratios or self.negative_penalty == "npo" or self.kl_weight > 0

    @property
    def resolved_beta(self) -> float:
        """`beta`, or the default of the chosen ranking loss."""
        # dpo's and kto's own 0.1 is for sums; on means it would hardly ever saturate.
        ratio = 0.1 if self.length_power == 0 else 2.0
        defaults = {"logistic": 2.0, "listwise": 1.0, "hinge": 1.0, "none": 1.0}
        defaults |= dict.fromkeys(LOG_RATIO_LOSSES, ratio)
        return defaults[self.ranking_loss] if self.beta is None else self.beta

    @property
    def resolved_npo_beta(self) -> float:
        """`npo_beta`, or 0.1 (the paper's) on summed log-probabilities and 1 on means."""
        default = 0.1 if self.length_power == 0 else 1.0
        return default if self.npo_beta is None else self.npo_beta
