"""What the help of each verb says besides its options: examples, notes, which options of a run it
shows. A new verb needs a page here; a test says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neat_align.cli.option_groups import ESSENTIALS, GROUPS, TRAINER_GROUPS

_LISTS = (
    "BOOL is true or false; a name alone means true. A list is written --name A B. Names may have "
    "dashes in place of underscores, and what is set here wins over the recipe."
)
_DATA, _SAMPLING, _REWARDS, _MODEL = "Data", "Sampling", "Rewards and judges", "Model and memory"
_ROUND = "NEAT: what a round samples and ranks"


BEGIN, RUN, MEASURE, LOOK = "Begin", "Run", "Measure", "Look, and take out"


@dataclass(frozen=True)
class Page:
    """A verb's page.

    Attributes:
        group: the group of verbs in which it stands.
        examples: commands, as they are typed.
        note: a paragraph below them.
        essentials: the options of a run that the verb shows first.
        run_options: titles of the groups of a run's options that it shows; none where it takes no
            such option.
        more: options that the verb reads itself from what is left: names, value, help.
        has_model: whether model and data come from a file that has to be given.
    """

    group: str
    examples: tuple[str, ...] = ()
    note: str = ""
    essentials: tuple[str, ...] = ()
    run_options: tuple[str, ...] = ()
    more: tuple[tuple[tuple[str, ...], str, str], ...] = ()
    has_model: bool = False

    def groups(self, *, every: bool) -> Mapping[str, tuple[str, ...]]:
        """The options of a run by the title under which they are shown."""
        first = {ESSENTIALS: self.essentials or GROUPS[ESSENTIALS]}
        if every:
            rest = {"More essentials": GROUPS[ESSENTIALS]} if self.essentials else {}
            return (
                first
                | rest
                | {t: n for t, n in GROUPS.items() if t != ESSENTIALS}
                | {**TRAINER_GROUPS}
            )
        return first | {t: GROUPS[t] for t in self.run_options if t != ESSENTIALS}


_MORE = "--help-all adds those of transformers' TrainingArguments."
PAGES: Mapping[str, Page] = {
    "init": Page(
        BEGIN,
        examples=(
            "neat-align init --model MODEL --data prompts.jsonl --bank politeness",
            "neat-align init --model MODEL --data prompts.jsonl --measure --output run.yaml",
        ),
    ),
    "doctor": Page(
        BEGIN,
        examples=("neat-align doctor", "neat-align doctor --vllm_server http://127.0.0.1:8000"),
    ),
    "export": Page(
        LOOK,
        examples=(
            "neat-align export runs/mine --format kto --output kto.jsonl",
            "neat-align export runs/mine --for axolotl --output pairs/",
        ),
    ),
    "merge": Page(LOOK, examples=("neat-align merge runs/mine --output merged",)),
    "push": Page(LOOK, examples=("neat-align push runs/mine --repo me/my-model",)),
    "demo": Page(
        BEGIN, examples=("neat-align demo", "neat-align demo --output_dir runs/mine --seed 1")
    ),
    "train": Page(
        RUN,
        examples=(
            "neat-align train --config recipes/quickstart.yaml --dry-run \\",
            "    --model MODEL --data prompts.jsonl",
            "neat-align train --config run.yaml --learning_rate 5e-5 --reward_funcs vader",
        ),
        note=f"{_LISTS} {_MORE}",
        run_options=tuple(GROUPS),
    ),
    "expand": Page(
        RUN,
        examples=(
            "neat-align expand --config run.yaml --output pairs.jsonl --form preference",
            "neat-align expand --model MODEL --data prompts.jsonl --reward_funcs vader \\",
            "    --output ranked.parquet",
        ),
        note=f"It takes every option of `train` (--help-all); those that matter here are "
        f"shown. {_LISTS}",
        essentials=(
            "model_name_or_path",
            "dataset_name",
            "reward_funcs",
            "instruction_bank",
            "prompts_per_round",
            "max_completion_length",
            "seed",
            "resume",
            "output_dir",
        ),
        run_options=(_DATA, _ROUND, _SAMPLING, _REWARDS, _MODEL),
    ),
    "evaluate": Page(
        MEASURE,
        examples=(
            "neat-align evaluate --model runs/mine/model --data prompts.jsonl \\",
            "    --reward_funcs vader --output_dir runs/mine-evaluated",
        ),
        note=f"It takes every option of `train` (--help-all); those that matter here are "
        f"shown. {_LISTS}",
        essentials=(
            "model_name_or_path",
            "dataset_name",
            "eval_dataset_name",
            "holdout",
            "reward_funcs",
            "judge_funcs",
            "output_dir",
            "max_completion_length",
            "seed",
        ),
        run_options=("Evaluation", _DATA, _SAMPLING, _REWARDS, _MODEL),
    ),
    "compare": Page(
        MEASURE,
        examples=(
            "neat-align compare --config compare-demo --seeds 0 1 2",
            "neat-align compare --config mine.yaml --methods neat dpo --max_steps 20",
        ),
        note="It takes every option of `train` (--help-all), which all methods then share. "
        + _LISTS,
        essentials=(
            "model_name_or_path",
            "dataset_name",
            "reward_funcs",
            "judge_funcs",
            "holdout",
            "max_steps",
            "seed",
        ),
        run_options=(ESSENTIALS,),
        more=(
            (("--methods",), "NAME ...", "Only these: methods of the file, or shipped ones."),
            (("--seeds",), "INT ...", "Seeds, in place of the file's."),
        ),
        has_model=True,
    ),
    "inspect": Page(
        LOOK,
        examples=(
            "neat-align inspect runs/mine --sort gap",
            "neat-align inspect runs/mine/rounds/0001 --origin negative --search sorry",
        ),
    ),
    "report": Page(LOOK, examples=("neat-align report runs/mine",)),
    "capability": Page(
        MEASURE,
        examples=(
            "neat-align capability --model runs/mine --base MODEL \\",
            "    --tasks arc_easy,hellaswag",
        ),
    ),
    "probe": Page(
        RUN,
        examples=(
            "neat-align probe --model MODEL --data prompts.jsonl --bank politeness \\",
            "    --reward vader",
            "neat-align probe --model demo --bank politeness --placement all \\",
            "    --output probe.json",
        ),
    ),
}
