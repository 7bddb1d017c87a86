"""What a run is made of besides the training configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from neat_align.errors import ConfigError
from neat_align.modeling.loading import check_source


@dataclass
class ScriptArguments:
    """What a run is made of besides the training configuration. Names follow TRL's scripts."""

    model_name_or_path: str = field(
        default="",
        metadata={"help": "The model: a hub name, a folder, or `demo` (SmolLM2-135M-Instruct)."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of a hub model; only with a hub name."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run Python that comes with the model. Needs a full commit as model_revision; "
            "read that code first."
        },
    )
    dataset_name: str = field(
        default="",
        metadata={
            "help": "Training prompts: a .jsonl, .json, .parquet or .csv file, a saved data set, "
            "a hub name, or `demo`."
        },
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split of a hub data set to train on."}
    )
    dataset_limit: int | None = field(
        default=None, metadata={"help": "Use only the first this many rows."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out prompts; None keeps back `holdout` training rows."},
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split of a hub data set to evaluate on."}
    )
    holdout: int = field(
        default=64,
        metadata={"help": "Rows kept back for evaluation when there is no eval_dataset_name."},
    )
    as_conversations: bool = field(
        default=False,
        metadata={"help": "Turn texts and Human/Assistant transcripts into chat messages."},
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards: vader, minilm_tone, contrast, package.module:function, a server's "
            "URL, or a classification model."
        },
    )
    judge_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards that only evaluation sees, never training."},
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Train a LoRA adapter instead of all weights."}
    )
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(
        default=32,
        metadata={"help": "LoRA scale; the update is multiplied by lora_alpha / lora_r."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; None: every linear layer."}
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on with the run in output_dir from its newest complete checkpoint."},
    )

    def __post_init__(self) -> None:
        for name, least in (("holdout", 0), ("lora_r", 1), ("lora_alpha", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.dataset_limit is not None and self.dataset_limit < 1:
            raise ConfigError(
                f"dataset_limit is {self.dataset_limit}; it must be 1 or more, or unset for every "
                "row"
            )
        if self.eval_dataset_split is not None and self.eval_dataset_name is None:
            raise ConfigError(
                f"eval_dataset_split is {self.eval_dataset_split!r}, but there is no "
                "eval_dataset_name for it to be a split of"
            )
        if self.model_name_or_path:
            check_source(self.model_name_or_path, self.model_revision, self.trust_remote_code)
