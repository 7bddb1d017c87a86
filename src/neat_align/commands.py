"""What the commands do, apart from reading the command line."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from neat_align.config import NEATConfig
from neat_align.data import PromptRow, load_rows, rows_from_dataset, to_conversation
from neat_align.demo.model import demo_model_path
from neat_align.errors import ConfigError
from neat_align.evaluation import Evaluation, compare
from neat_align.policy import load_policy, load_tokenizer
from neat_align.report import write_report
from neat_align.run_record import commit, versions
from neat_align.settings import RunSettings
from neat_align.signals import listening
from neat_align.storage import read_json, write_folder, write_json
from neat_align.trainer import NEATTrainer


def load_data(settings: RunSettings) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training rows and held-out rows, disjoint by prompt."""
    if not settings.dataset_name:
        raise ConfigError("dataset_name is missing: name a file with prompts, a hub data set, or demo")
    demo = settings.dataset_name == "demo"
    if demo:
        if settings.dataset_train_split is not None:
            raise ConfigError(
                f"dataset_train_split is {settings.dataset_train_split!r}, but the demo's prompts have no splits: take it out"
            )
        rows = demo_rows("train")[: settings.dataset_limit]
    else:
        rows = load_rows(settings.dataset_name, split=settings.dataset_train_split, limit=settings.dataset_limit)
    held_out: list[PromptRow] = []
    if settings.eval_dataset_name is not None:
        held_out = load_rows(settings.eval_dataset_name, split=settings.eval_dataset_split)
    elif demo:
        shipped = demo_rows("heldout")
        if settings.holdout > len(shipped):
            raise ConfigError(
                f"holdout is {settings.holdout}, but the demo holds {len(shipped)} prompts out: lower it, or give eval_dataset_name"
            )
        held_out = _spread(shipped, settings.holdout)
    elif settings.holdout:
        if settings.holdout >= len(rows):
            raise ConfigError(f"holdout is {settings.holdout} but there are only {len(rows)} rows: lower it, or give eval_dataset_name")
        held_out = _spread(rows, settings.holdout)
    prompts = {json.dumps(row.prompt) for row in held_out}
    rows = [row for row in rows if json.dumps(row.prompt) not in prompts]
    if settings.as_conversations:
        return [to_conversation(r) for r in rows], [to_conversation(r) for r in held_out]
    return rows, held_out


def _spread(rows: Sequence[PromptRow], n: int) -> list[PromptRow]:
    """`n` of the rows, evenly spaced and in their order: data in any order is held out evenly."""
    picked = {round(i * len(rows) / n) for i in range(n)}
    return [row for i, row in enumerate(rows) if i in picked]


def demo_rows(split: str) -> list[PromptRow]:
    """The prompts that ship with the package; `split` is train or heldout."""
    text = (files("neat_align") / "demo" / "prompts.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return rows_from_dataset([{k: v for k, v in r.items() if k != "split"} for r in records if r["split"] == split], name="demo prompts")


def build_trainer(settings: RunSettings, config: NEATConfig, callbacks: Sequence[TrainerCallback] = ()) -> NEATTrainer:
    """The trainer of a run, with everything checked that can be checked before sampling."""
    if not settings.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name a model to align, or demo")
    rows, held_out = load_data(settings)
    name = demo_model_path() if settings.model_name_or_path == "demo" else settings.model_name_or_path
    model = load_policy(name, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code)
    tokenizer = load_tokenizer(model, revision=settings.model_revision, trust_remote_code=settings.trust_remote_code)
    peft_config = None
    if settings.use_peft:
        from peft import LoraConfig

        peft_config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=0.0,
            target_modules=settings.lora_target_modules or "all-linear",
        )
    return NEATTrainer(
        model,
        settings.reward_funcs or None,
        config,
        train_dataset=rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=peft_config,
        judge_funcs=settings.judge_funcs or None,
    )


def train(settings: RunSettings, config: NEATConfig) -> dict[str, Any]:
    """Evaluate, train, evaluate again; write the model, result.json and the report. Returns the result."""
    if not settings.resume and config.process_index == 0:
        _check_empty(Path(str(config.output_dir)))
    trainer = build_trainer(settings, config)
    with listening(trainer.stop), trainer.writing():
        return _train(trainer, settings)


def _train(trainer: NEATTrainer, settings: RunSettings) -> dict[str, Any]:
    started = time.monotonic()
    resume = True if settings.resume else None
    trainer.open_run(resume)  # before an evaluation is paid for
    before = evaluation_before(trainer) if trainer.eval_rows else None
    trainer.train(resume_from_checkpoint=resume)
    out = trainer.output_dir
    if trainer.args.world_size == 1:
        write_folder(out / "model", lambda folder: trainer.save_model(str(folder)))
    else:  # all processes save parts of it into one folder
        trainer.save_model(str(out / "model"))
    result: dict[str, Any] = {}
    if before is not None:
        trainer.evaluate(metric_key_prefix="after")
        after = trainer.last_evaluation
        assert after is not None
        write_json(out / "evaluation-after.json", after.to_json())
        result = compare(before, after, seed=trainer.args.seed)
    result |= {
        "seed": trainer.args.seed,
        "rounds": trainer.state.global_step // trainer.steps_per_round,
        "steps": trainer.state.global_step,
        "stopped_because": trainer.stopped_because,
        "wall_seconds": time.monotonic() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "model": settings.model_name_or_path,
        "dataset": Path(settings.dataset_name).name,
        "commit": commit(),
        "versions": versions(),
    }
    write_json(out / "result.json", result)
    write_report(out)
    return result


def _check_empty(folder: Path) -> None:
    """Refuse to write a run among what is there already: nothing could tell the two apart later."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir is {folder}, which is a file: choose a folder")
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if found:
        raise ConfigError(
            f"output_dir is {folder}, which is not empty ({', '.join(found[:4])}): choose another one, or pass --resume true to go on with "
            "the run in it"
        )


def evaluation_before(trainer: NEATTrainer) -> Evaluation:
    """The start policy on the held-out prompts; a resumed run reads what it measured before it was interrupted."""
    path = trainer.output_dir / "evaluation-before.json"
    if path.is_file():
        return Evaluation(**read_json(path))
    trainer.evaluate(metric_key_prefix="before")
    assert trainer.last_evaluation is not None
    write_json(path, trainer.last_evaluation.to_json())
    return trainer.last_evaluation


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- the other commands ----------------------------------------------------------------------------------------------


def expand(settings: RunSettings, config: NEATConfig, output: Path, form: str) -> None:
    """Sample, score and rank one round over the data, and write it as a data set."""
    from neat_align.groups import groups_to_table, preference_rows, ranked_rows
    from neat_align.storage import write_atomic, write_table

    forms = {"ranked": ranked_rows, "preference": preference_rows}
    if form != "groups" and form not in forms:
        raise ConfigError(f"form is {form!r}; it must be ranked, preference or groups")
    if output.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"{output} must end in .parquet or .jsonl")
    if form == "groups" and output.suffix != ".parquet":
        raise ConfigError(f"groups keep token ids and log-probabilities and go to .parquet, not {output.suffix}")
    trainer = build_trainer(replace(settings, holdout=0), config)
    if (trainer.round_folder(0) / "manifest.json").is_file() and not settings.resume:
        raise ConfigError(
            f"{trainer.output_dir} holds a finished expansion: delete it, choose another --output, or pass --resume true to write "
            "the same groups out again"
        )
    with listening(trainer.stop), trainer.writing():
        made = trainer.make_round(0)
    if form == "groups":
        write_table(output, groups_to_table(made.groups, [r.name for r in trainer.rewards]))
        written = len(made.groups)
    else:
        rows = forms[form](made.groups, rank_by=trainer.expand_params().rank_by)
        written = len(rows)
        if output.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomic(output, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        else:
            import pyarrow as pa

            write_table(output, pa.Table.from_pylist(rows))
    print(f"{written} rows ({form}) in {output}; they hold text that was written to be harmful, on purpose")
    print(f"look at the groups: neat-align inspect {trainer.output_dir}")


def evaluate(settings: RunSettings, config: NEATConfig) -> None:
    """Sample and judge the model on the held-out prompts; print the means and keep the whole as JSON."""
    trainer = build_trainer(settings, config)
    with trainer.writing():
        metrics = trainer.evaluate()
    assert trainer.last_evaluation is not None
    path = trainer.output_dir / "evaluation.json"
    write_json(path, trainer.last_evaluation.to_json())
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.4g}")
    print(f"completions and scores: {path}")


def print_result(result: dict[str, Any], run: Path) -> None:
    """The before/after table of a run, and where everything is."""
    from rich.console import Console

    console = Console()
    if "reward_before" in result:
        console.print(result_table(result))
    print_closing(console, result, run)


def print_closing(console: Any, result: dict[str, Any], run: Path) -> None:
    """What a run took, where everything is, and the next command; the last lines of every run."""
    if result["stopped_because"]:
        console.print(f"stopped early: {result['stopped_because']}", markup=False, style="yellow")
    minutes, gib = result["wall_seconds"] / 60, result["peak_rss_bytes"] / 2**30
    lines = [
        f"{result['rounds']} rounds, {result['steps']} steps, {minutes:.1f} minutes, {gib:.1f} GiB at most",
        f"model   {run / 'model'}",
        f"report  {run / 'report.html'}",
        f"numbers {run / 'result.json'}",
        "",
        f"look at what it wrote:  neat-align inspect {run} --sort gap",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def result_table(result: dict[str, Any]) -> Any:
    """Before and after, side by side; a rich renderable."""
    from rich.table import Table

    table = Table(title=f"{result['held_out_prompts']} held-out prompts, plain, the same seeds before and after", title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)

    def row(name: str, key: str, change: str = "") -> None:
        before, after = result.get(f"{key}_before"), result.get(f"{key}_after")
        if before is not None and after is not None:
            table.add_row(name, f"{before:.3g}", f"{after:.3g}", change or f"{after / before - 1:+.1%}")

    row("reward", "reward", _interval(result, "reward_delta"))
    row(f"second judge ({result['second_judge']})", "second_judge", _interval(result, "second_judge_delta"))
    row("perplexity of reference answers", "perplexity")
    row("distinct-2", "distinct2")
    row("mean length, tokens", "mean_length")
    if result["kl_per_token"] is not None:
        table.add_row("KL to the start, nats per token", "0", f"{result['kl_per_token']:.3f}", "")
    return table


def _interval(result: dict[str, Any], key: str) -> str:
    if result.get(key) is None:
        return ""
    low, high = result[f"{key}_ci95"]
    return f"{result[key]:+.3f} [{low:+.3f}, {high:+.3f}]"
