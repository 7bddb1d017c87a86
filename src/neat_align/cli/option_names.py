"""One name for one thing in every verb, with the shorter ways to write it.

The names are those of TRL's scripts (`model_name_or_path`, `dataset_name`, `output_dir`); command
line and recipe take the others as well, with dashes or underscores.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping

from neat_align.errors import ConfigError

# Each option's other spellings. A test holds that no verb has another name for one of these things.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "model_name_or_path": ("model",),
    "dataset_name": ("data", "dataset"),
    "eval_dataset_name": ("eval_data", "eval_dataset"),
    "output_dir": ("output",),
    "reward_funcs": ("rewards", "reward"),
    "judge_funcs": ("judges",),
    "instruction_bank": ("bank",),
    "instruction_placement": ("placement",),
}
# What the same thing is called in TRL, axolotl, OpenRLHF and LLaMA-Factory, where ours is not near.
ELSEWHERE: Mapping[str, str] = {
    "base_model": "model_name_or_path",
    "pretrain": "model_name_or_path",
    "torch_dtype": "dtype",
    "prompt_data": "dataset_name",
    "val_set_size": "holdout",
    "test_size": "holdout",
    "reward_model_path": "reward_funcs",
    "reward_model": "reward_funcs",
    "reward_pretrain": "reward_funcs",
    "adapter": "use_peft",
    "finetuning_type": "use_peft",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "micro_batch_size": "per_device_train_batch_size",
    "sequence_len": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "cutoff_len": "max_prompt_length",
    "num_generations": "num_plain",
    "n_samples_per_prompt": "num_plain",
    "loss_type": "ranking_loss",
    "init_kl_coef": "kl_weight",
    "kl_coef": "kl_weight",
    "use_vllm": "sampler",
    "vllm_server_base_url": "vllm_server",
    "resume_from_checkpoint": "resume",
}
_NAME_OF: Mapping[str, str] = {
    spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings
}


def option_name(argument: str) -> str:
    """The option that a `--name` or `--name=value` of the command line means, with either dash and
    in any spelling.
    """
    return canonical(argument.removeprefix("--").split("=")[0].replace("-", "_"))


def canonical(name: str) -> str:
    """The option that a spelling means; the name itself where it is no other's spelling."""
    return _NAME_OF.get(name, name)


def flags(name: str) -> tuple[str, ...]:
    """Every way to write an option on the command line, its own name first."""
    return tuple(f"--{spelling}" for spelling in (name, *SPELLINGS.get(name, ())))


def one_spelling(arguments: Iterable[str]) -> list[str]:
    """Arguments with every option under its own name.

    Raises ConfigError where an option is given under two names.
    """
    written: dict[str, str] = {}
    words = []
    for word in arguments:
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        head, equals, value = word.partition("=")
        name = option_name(head)
        given = head.removeprefix("--").replace("-", "_")
        if written.setdefault(name, given) != given:
            raise ConfigError(
                f"--{written[name]} and --{given} are one option ({name}): give one of them"
            )
        words.append(f"--{name}{equals}{value}" if name != given else word)
    return words


def check_one_spelling(names: Iterable[str], place: Callable[[str], str]) -> None:
    """Raises ConfigError for two names of one option, at the second's place."""
    written: dict[str, str] = {}
    for name in names:
        first = written.setdefault(canonical(name), name)
        if first != name:
            raise ConfigError(
                f"{place(name)}: {first} and {name} are one option ({canonical(name)}): give one "
                "of them"
            )


def meant(name: str, known: Collection[str]) -> str | None:
    """What somebody probably meant by a name that is no option; None where nothing is near."""
    if ELSEWHERE.get(name) in known:
        return ELSEWHERE[name]
    near = difflib.get_close_matches(name, [*known, *_NAME_OF], n=1)
    return near[0] if near else None
