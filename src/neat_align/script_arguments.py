"""What a run is made of besides the training configuration.

No torch until one is made: the command line explains these options without it.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neat_align.config.constraints import (
    OnlyWith,
    Rule,
    check_options,
    default_of,
    option,
    read_numbers,
)
from neat_align.config.load_values import ATTENTIONS, DTYPES
from neat_align.data_options import DataOptions
from neat_align.prompts.dataset_config import DatasetConfig, check_split

if TYPE_CHECKING:
    from neat_align.modeling.load_options import LoadOptions

# What is said of one data set, and in each entry of `datasets` for itself.
_OF_ONE_DATASET = (
    ("dataset_name", "path"),
    ("dataset_config", "name"),
    ("dataset_train_split", "split"),
    ("dataset_columns", "columns"),
)


def _is_beside_a_mixture(name: str, script: Any) -> bool:
    return bool(script.datasets and getattr(script, name))


_RULES = tuple(
    Rule(
        functools.partial(_is_beside_a_mixture, name),
        f"{name} is {{c.{name}!r}} and datasets lists a mixture: leave {name} out (in datasets, "
        f"it is each entry's {key})",
    )
    for name, key in _OF_ONE_DATASET
)


@dataclass
class ScriptArguments(DataOptions):
    """What a run is made of besides the training configuration. Names follow TRL's scripts."""

    model_name_or_path: str = option(
        "", "The model: a hub name, a folder, or `demo` (SmolLM2-135M-Instruct)."
    )
    model_revision: str | None = option(
        None, "Branch, tag or commit of a hub model; only with a hub name."
    )
    trust_remote_code: bool = option(
        False,
        "Run Python that comes with the model. Needs a full commit as model_revision; read that "
        "code first.",
    )
    dtype: str = option(
        "float32",
        "Type of the model's weights: float32; bfloat16 or float16, where an adapter is trained "
        "(use_peft) or nothing is; auto, the type in which they were saved, and float32 where they "
        "are trained.",
        choices=DTYPES,
    )
    attn_implementation: str | None = option(
        None,
        "Attention of the model: eager, sdpa, flash_attention_2, …; None is transformers' choice. "
        "Packed rows (prefix_sharing) bring their own.",
        choices=ATTENTIONS,
    )
    load_in_4bit: bool = option(
        False,
        "Hold the frozen weights under an adapter in 4 bits (NF4; needs bitsandbytes and CUDA).",
        only_with=(
            OnlyWith(
                "use_peft",
                "load_in_4bit is true and use_peft is false: weights of 4 bits cannot be trained; "
                "set use_peft: true, or leave it out (dtype: bfloat16 is for a model that is only "
                "sampled from)",
                one_of=(True,),
            ),
        ),
    )
    dataset_name: str = option(
        "",
        "Training prompts: a .jsonl, .json, .parquet or .csv file (also .gz, .zst), several "
        "(`data/*.jsonl`), a saved data set, a hub name, or `demo`.",
    )
    dataset_train_split: str | None = option(
        None, "Split to train on, or a part of one: test, train[:1000], train[10%%:]."
    )
    dataset_limit: int | None = option(
        None,
        "Use only the first this many rows.",
        ge=1,
        needed="it must be 1 or more, or unset for every row",
    )
    eval_dataset_name: str | None = option(
        None, "Held-out prompts; None keeps back `holdout` training rows."
    )
    eval_dataset_split: str | None = option(
        None,
        "Split to evaluate on, or a part of one.",
        only_with=(
            OnlyWith(
                "eval_dataset_name",
                "eval_dataset_split is {c.eval_dataset_split!r}, but there is no eval_dataset_name "
                "for it to be a split of",
                none_of=(None,),
            ),
        ),
    )
    holdout: int | None = option(
        None,
        "Prompts kept back for evaluation when there is no eval_dataset_name; None is 64, or a "
        "quarter of the prompts where that is less. 0 keeps back none.",
        ge=0,
        needed="it must be 0 or more, or unset",
    )
    as_conversations: bool = option(
        False, "Turn texts and Human/Assistant transcripts into chat messages."
    )
    as_texts: bool = option(
        False,
        "Turn chat messages into Human/Assistant transcripts, for a model without a chat template.",
        only_with=(
            OnlyWith(
                "as_conversations",
                "as_conversations makes messages of texts and as_texts makes texts of messages: "
                "give one of them",
                one_of=(False,),
            ),
        ),
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards: vader, minilm_tone, offensiveness, harmless_pairs, similarity, "
            "contrast, package.module:function, a classification model, vllm:URL of one that vLLM "
            "serves, judge:FILE.yaml (a language model with a rubric), or a reward server's URL."
        },
    )
    judge_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards that only evaluation sees, never training."},
    )
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "LoRA rank.", ge=1)
    lora_alpha: int = option(
        32, "LoRA scale; the update is multiplied by lora_alpha / lora_r.", ge=1
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; None: every linear layer."}
    )
    resume: bool = option(
        False, "Go on with the run in output_dir from its newest complete checkpoint."
    )
    auto_resume: bool = option(
        False,
        "Go on with the run in output_dir where there is one, else begin it: for schedulers that "
        "start the same command again. (torchrun's own restarts need no option.)",
        only_with=(
            OnlyWith(
                "resume",
                "resume asks for a run that is there, auto_resume goes on with one or begins it: "
                "give one of them",
                none_of=(True,),
            ),
        ),
    )

    def chosen(self) -> dict[str, Any]:
        """What is not at its default, but for whether an earlier run is gone on with."""
        values = asdict(self)
        return {
            f.name: values[f.name]
            for f in fields(self)
            if f.name not in ("resume", "auto_resume") and getattr(self, f.name) != default_of(f)
        }

    def __post_init__(self) -> None:
        read_numbers(self)
        self.read_data_options()
        check_options(self, _RULES)
        for name in ("dataset_train_split", "eval_dataset_split"):
            if (split := getattr(self, name)) is not None:
                check_split(split, name)
        if self.model_name_or_path:
            from neat_align.modeling.loading import check_source

            check_source(self.model_name_or_path, self.model_revision, self.trust_remote_code)

    @property
    def load_options_to_train(self) -> LoadOptions:
        """How a model is loaded that is trained: in fp32 where its own weights are."""
        options = self.load_options
        return options if self.use_peft else options.where_all_weights_learn()

    @property
    def load_options(self) -> LoadOptions:
        """How the model is loaded."""
        from neat_align.modeling.load_options import LoadOptions

        return LoadOptions(
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            load_in_4bit=self.load_in_4bit,
        )

    @property
    def training_sources(self) -> list[DatasetConfig]:
        """The data sets to train on; none where none is named."""
        if self.datasets or not self.dataset_name:
            return list(self.datasets)
        return [
            DatasetConfig(
                self.dataset_name,
                name=self.dataset_config,
                split=self.dataset_train_split,
                columns=_columns(self.dataset_columns),
            )
        ]

    @property
    def eval_source(self) -> DatasetConfig | None:
        """The held-out data set, where one is named."""
        if self.eval_dataset_name is None:
            return None
        return DatasetConfig(
            self.eval_dataset_name,
            name=self.eval_dataset_config,
            split=self.eval_dataset_split,
            columns=_columns(self.eval_dataset_columns),
        )

    @property
    def data_title(self) -> str:
        """What results call the training data: names without folders."""
        return " + ".join(Path(source.path).name for source in self.training_sources)


def _columns(given: Any) -> Any:
    """A mapping that may have come as text, which `read_data_options` has read."""
    assert not isinstance(given, str)
    return given
