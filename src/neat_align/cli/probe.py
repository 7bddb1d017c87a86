"""`neat-align probe`: how strongly a bank's instruction pairs move a model's reward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neat_align.cli import completion
from neat_align.cli.console import importing, quiet
from neat_align.cli.option_names import flags

_DECODING = "Decoding from the contrast"
BankOption = Annotated[
    str,
    typer.Option(
        *flags("instruction_bank"),
        autocompletion=completion.banks,
        help="Name of a shipped bank, or path of a YAML file with pairs.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        *flags("dataset_name"),
        autocompletion=completion.demo,
        help="Prompts: a file, a saved data set, a hub name, or demo.",
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        *flags("model_name_or_path"),
        autocompletion=completion.demo,
        help="A hub name, a folder, or demo.",
    ),
]
ConversationsOption = Annotated[
    bool, typer.Option("--as-conversations", help="Turn text prompts into chat messages.")
]
RewardOption = Annotated[
    str,
    typer.Option(
        *flags("reward_funcs"),
        autocompletion=completion.rewards,
        help="vader, minilm_tone, offensiveness, harmless_pairs, contrast, module:function, a URL, "
        "or a model.",
    ),
]
HostsOption = Annotated[
    list[str] | None, typer.Option(help="Private host whose reward server may be asked over http.")
]
PlacementOption = Annotated[
    str,
    typer.Option(
        *flags("instruction_placement"),
        help="Where the instruction goes: system, user_suffix, affix, or all to compare them.",
    ),
]
BadRowOption = Annotated[
    str, typer.Option(help="A row that cannot be used: error, or skip to leave it out.")
]
SeedOption = Annotated[
    int, typer.Option(help="Seed of the prompts' choice, the sampling and the intervals.")
]

KwargsOption = Annotated[
    str | None, typer.Option(help="Variables for the chat template, as a JSON object.")
]
AlphaOption = Annotated[
    list[float] | None,
    typer.Option(
        rich_help_panel=_DECODING,
        help="Also answer from the contrast of the bank's pairs, this strong (0.5 1: twice).",
    ),
]
PairsOption = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_DECODING,
        help="Pairs averaged for a prompt in the contrast; 3 by default.",
    ),
]
CutOption = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_DECODING,
        help="The contrast moves tokens of at least this share of the likeliest one's probability; "
        "0.05 by default, 0 moves all.",
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Type of the model's weights: float32, bfloat16, float16 or auto.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "--output_dir",
        help="A .json file for the numbers, or a folder: probe.json in it.",
    ),
]


PromptsOption = Annotated[int, typer.Option(help="Prompts to answer.")]


def probe(
    bank: BankOption,
    model: ModelOption,
    dtype: DtypeOption = "float32",
    dataset_name: DataOption = "demo",
    as_conversations: ConversationsOption = False,
    reward: RewardOption = "vader",
    allow_http_hosts: HostsOption = None,
    placement: PlacementOption = "user_suffix",
    prompts: PromptsOption = 24,
    samples: Annotated[int, typer.Option(help="Answers to a prompt under each instruction.")] = 2,
    max_completion_length: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 48,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; above 0.")] = 0.7,
    seed: SeedOption = 0,
    generation_batch_size: Annotated[int, typer.Option(help="Answers sampled at once.")] = 64,
    on_bad_row: BadRowOption = "error",
    chat_template_kwargs: KwargsOption = None,
    alpha: AlphaOption = None,
    pairs: PairsOption = None,
    min_p: CutOption = None,
    output: OutputOption = None,
) -> None:
    """Measure how strongly each pair of a bank moves a model's reward, before training."""
    with importing():
        quiet()
        from neat_align.cli.probe_options import ProbeSettings
        from neat_align.cli.probe_run import run_probe

    settings = ProbeSettings(
        bank=bank,
        model=model,
        dtype=dtype,
        dataset_name=dataset_name,
        as_conversations=as_conversations,
        reward=reward,
        allow_http_hosts=tuple(allow_http_hosts or ()),
        placement=placement,
        prompts=prompts,
        samples=samples,
        max_completion_length=max_completion_length,
        temperature=temperature,
        seed=seed,
        generation_batch_size=generation_batch_size,
        on_bad_row=on_bad_row,
        chat_template_kwargs=chat_template_kwargs,
        alpha=tuple(alpha or ()),
        pairs=pairs,
        min_p=min_p,
    )
    run_probe(settings, output)
