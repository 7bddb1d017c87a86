"""A whole run, from arguments to a result: data, trainer, evaluation before and after, report."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformers import TrainerCallback

from neat_align.config import NEATConfig
from neat_align.config.unsupported import check_command_options
from neat_align.demo.rows import demo_rows
from neat_align.errors import ConfigError
from neat_align.evaluation.before_after import before_after
from neat_align.evaluation.held_out import Evaluation
from neat_align.files.atomic import read_json, write_folder, write_json
from neat_align.files.provenance import commit, cpu_name, peak_rss_bytes, versions
from neat_align.modeling.demo_model import model_source
from neat_align.modeling.loading import load_policy, load_tokenizer
from neat_align.modeling.requirements import frozen_if_half
from neat_align.prompts.hold_out import hold_out, refilled, spread, without
from neat_align.prompts.instruction_banks import load_bank
from neat_align.prompts.loading import load_rows
from neat_align.prompts.row_checks import is_usable
from neat_align.prompts.row_forms import to_conversation, to_text
from neat_align.prompts.rows import PromptRow, is_conversational
from neat_align.prompts.skipped_rows import SkippedRows
from neat_align.reporting.model_card import write_model_card
from neat_align.reporting.run_report import write_report
from neat_align.rewards.judge_totals import judge_totals
from neat_align.rewards.protocol import RewardSum
from neat_align.runs.launch import holds_run, is_restart, note_launch
from neat_align.runs.leftovers import is_free, leaving_nothing, remove_leftovers
from neat_align.runs.lock import one_writer
from neat_align.runs.record import RecordMore
from neat_align.runs.signals import listening
from neat_align.script_arguments import ScriptArguments
from neat_align.trainer import NEATTrainer
from neat_align.trainer.hub import MODEL_FOLDER, card_model, push_saved
from neat_align.trainer.setup import instructed_limits
from neat_align.trainer.trackers import after_training

logger = logging.getLogger(__name__)
# `load_rows`, knowing what to do with bad rows.
Reader: TypeAlias = Callable[..., list[PromptRow]]


def load_data(
    script: ScriptArguments,
    on_bad_row: str = "error",
    skipped: SkippedRows | None = None,
    notices: list[str] | None = None,
) -> tuple[list[PromptRow], list[PromptRow]]:
    """Training rows and held-out rows, disjoint by prompt.

    `on_bad_row` and `skipped` are those of `load_rows`. What a reader of the result has to know
    about the data is warned of, and added to `notices`.
    """
    if not script.training_sources:
        raise ConfigError(
            "dataset_name is missing: name a file with prompts, a hub data set, or demo"
        )
    if script.dataset_streaming:
        raise ConfigError(
            "dataset_streaming is true, and only expand streams: every other command needs to know "
            "all of the data; leave it out, or set dataset_limit"
        )
    read = functools.partial(
        load_rows, on_bad_row=on_bad_row, skipped=skipped, mixed_forms=script.as_conversations
    )
    rows = _training_rows(script, read)
    held_out, notice = _held_out_rows(script, rows, read)
    if notice is not None:
        logger.warning("%s", notice)
        if notices is not None:
            notices.append(notice)
    rows = without(rows, held_out)
    if script.as_conversations:
        return [to_conversation(r) for r in rows], [to_conversation(r) for r in held_out]
    if script.as_texts:
        return [to_text(r) for r in rows], [to_text(r) for r in held_out]
    return rows, held_out


def _training_rows(script: ScriptArguments, read: Reader) -> list[PromptRow]:
    limit = script.dataset_limit
    if script.dataset_name != "demo":
        return read(script.training_sources, limit=limit)
    for name, lacking in (
        ("dataset_train_split", "splits"),
        ("dataset_config", "configurations"),
        ("dataset_columns", "other columns"),
    ):
        if (given := getattr(script, name)) is not None:
            raise ConfigError(
                f"{name} is {given!r}, but the demo's prompts have no {lacking}: take it out"
            )
    return demo_rows("train")[:limit]


def _held_out_rows(
    script: ScriptArguments, rows: Sequence[PromptRow], read: Reader
) -> tuple[list[PromptRow], str | None]:
    """Rows of `eval_dataset_name`, else `holdout` of the demo's own or of the training rows.

    And a notice where they are not as many as that.
    """
    if (source := script.eval_source) is not None:
        return read(source), None
    if script.dataset_name != "demo":
        return hold_out(rows, script.holdout, script.data_title)
    shipped, n = demo_rows("heldout"), script.holdout
    if n is None or n == len(shipped):
        return shipped, None
    if n > len(shipped):
        return shipped, f"the demo holds {len(shipped)} prompts out, not {n} as holdout asks for"
    return (spread(shipped, n) if n else []), None


def build_trainer(
    script: ScriptArguments,
    config: NEATConfig,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    eval_rewards: RewardSum | None = None,
    policy: str | None = None,
    trains: bool = True,
    data: tuple[list[PromptRow], list[PromptRow]] | None = None,
    tokenizer: Any = None,
    may_push: bool = False,
) -> NEATTrainer:
    """The trainer of a run, with everything checked that can be checked before sampling.

    `eval_rewards` are what evaluation reports as the reward; None: what is trained on. `policy` is
    a model that was trained elsewhere from the script's model, by name or path: it is the policy
    then, the script's model the start policy, and prompts are as the script's tokenizer has them.
    Without `trains`, as with `policy`, the model may be held in half precision: it is frozen then.
    `data` are rows and held-out rows in the place of the script's, `tokenizer` that of its model,
    where they are there already. `may_push`: a model comes of it.
    """
    if not script.model_name_or_path:
        raise ConfigError("model_name_or_path is missing: name a model to align, or demo")
    check_command_options(config, may_push=may_push)
    skipped, notices = SkippedRows(), list[str]()
    rows, held_out = data or load_data(script, config.on_bad_row, skipped, notices)
    trains, once = trains and policy is None, config.loads_once
    start = _model(script, trains=trains, once=once)
    revision, trusted = script.model_revision, script.trust_remote_code
    tokenizer = load_tokenizer(start, tokenizer, revision=revision, trust_remote_code=trusted)
    if config.on_bad_row == "skip" and script.eval_dataset_name is None and held_out:
        usable = _usable_to_evaluate(config, start, tokenizer, rows)
        rows, held_out = refilled(rows, held_out, usable)
    model = start if policy is None else load_policy(policy, script.load_options, once=once)
    trainer = NEATTrainer(
        model if trains else frozen_if_half(model),
        script.reward_funcs or None,
        config,
        train_dataset=rows,
        eval_dataset=held_out or None,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=lora_config(script) if policy is None else None,
        ref_model=None if policy is None else cast("Any", start),
        judge_funcs=script.judge_funcs or None,
        eval_rewards=eval_rewards,
    )
    trainer.parts.data.skipped.take(skipped)
    trainer.parts.data.notices.extend(notices)
    return trainer


def _model(script: ScriptArguments, *, trains: bool, once: bool) -> torch.nn.Module:
    return load_policy(
        model_source(script.model_name_or_path),
        script.load_options_to_train if trains else script.load_options,
        revision=script.model_revision,
        trust_remote_code=script.trust_remote_code,
        once=once,
    )


def _usable_to_evaluate(
    config: NEATConfig, model: torch.nn.Module, tokenizer: Any, rows: Sequence[PromptRow]
) -> Callable[[PromptRow], bool]:
    """Which rows can be held out: plainly, and under the instructions of an evaluation."""
    bank, conversational = load_bank(config.instruction_bank), is_conversational(rows)
    limits = instructed_limits(config, tokenizer, bank, [model], conversational=conversational)
    return functools.partial(
        is_usable,
        tokenizer=tokenizer,
        max_prompt_length=config.max_prompt_length,
        conversational=conversational,
        instructed=limits.held_out,
        drop_old_turns=config.drop_old_turns,
    )


def lora_config(script: ScriptArguments) -> Any:
    """The adapter that a run trains; None where it trains all weights."""
    if not script.use_peft:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=0.0,
        target_modules=script.lora_target_modules or "all-linear",
        revision=script.model_revision,  # of the base, for whoever loads the adapter
    )


def run_training(
    script: ScriptArguments, config: NEATConfig, callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Evaluate, train, evaluate again; write the model, result.json and the report.

    Returns the result, on every process; the first alone writes. A run that its launcher starts
    again after a crash (torchrun's `--max-restarts`) goes on as with `resume`.
    """
    folder, is_first = Path(str(config.output_dir)), config.process_index == 0
    with leaving_nothing(folder) if is_first else contextlib.nullcontext():
        # Only what the first process finds counts: it opens the run.
        resume = is_first and _goes_on(script, folder)
        told = [*callbacks, RecordMore({"script": script.chosen()})]
        trainer = build_trainer(script, config, told, may_push=True)
        with listening(trainer.parts.ranks.stop), trainer.writing():
            if trainer.parts.ranks.is_rank_zero:
                note_launch(trainer.output_dir)
            return _train(trainer, script, resume=True if resume else None)


def _goes_on(script: ScriptArguments, folder: Path) -> bool:
    """Whether the run in the folder is gone on with. Raises ConfigError when none can begin."""
    if script.resume:
        return True
    is_again = is_restart(folder)
    if (is_again or script.auto_resume) and holds_run(folder):
        return True
    if not is_again:
        _make_free(folder)
        note_launch(folder)  # a crash may come before the run's first file
    return False


def _train(trainer: NEATTrainer, script: ScriptArguments, *, resume: bool | None) -> dict[str, Any]:
    started = time.monotonic()
    trainer.open_run(resume)  # before an evaluation is paid for
    before: Evaluation | None = None

    def measure() -> None:
        nonlocal before
        before = evaluation_before(trainer)

    if trainer.parts.data.eval_rows:
        trainer.round_callback.before_training(measure)
    trainer.train(resume_from_checkpoint=resume)
    _save_model(trainer)
    ranks = trainer.parts.ranks
    results: list[dict[str, Any]] = [{}]
    with after_training(trainer):  # its trackers take what is measured now, too
        after = None
        if before is not None:
            trainer.evaluate(metric_key_prefix="after")
            after = trainer.last_evaluation

        def write() -> None:
            seconds = time.monotonic() - started
            results[0] = _write_result(trainer, script, before, after, seconds)

        ranks.run_on_rank_zero(write, "while it wrote the result")
    if trainer.args.push_to_hub:
        message = "The finished model"
        ranks.run_on_rank_zero(lambda: push_saved(trainer, message), "while it pushed the model")
    return ranks.from_rank_zero(results[0])


def _save_model(trainer: NEATTrainer) -> None:
    """Save the model whole or not at all: all ranks may write parts of it into one folder."""
    ranks, path = trainer.parts.ranks, trainer.output_dir / MODEL_FOLDER
    if trainer.args.world_size == 1:
        write_folder(path, lambda folder: trainer.save_model(str(folder), _internal_call=True))
        return
    written = trainer.output_dir / ".model-of-all"
    ranks.run_on_rank_zero(
        lambda: shutil.rmtree(written, ignore_errors=True), "before it saved the model"
    )
    ranks.run_on_all_ranks(
        lambda: trainer.save_model(str(written), _internal_call=True), "while it saved the model"
    )

    ranks.run_on_rank_zero(lambda: write_folder(path, written.replace), "while it saved the model")


def _write_result(
    trainer: NEATTrainer,
    script: ScriptArguments,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> dict[str, Any]:
    """Write what was found and how; on one rank."""
    out = trainer.output_dir
    result: dict[str, Any] = {}
    if before is not None and after is not None:
        write_json(out / "evaluation-after.json", after.to_json())
        result = before_after(before, after, seed=trainer.args.seed)
    result |= {
        "seed": trainer.args.seed,
        "rounds": trainer.state.global_step // trainer.steps_per_round,
        "steps": trainer.state.global_step,
        "stopped_because": trainer.stopped_because,
        "wall_seconds": seconds,
        "processes": trainer.args.world_size,
        "peak_rss_bytes": peak_rss_bytes(),
        "model": script.model_name_or_path,
        "dataset": script.data_title,
        "notices": list(trainer.parts.data.notices),
        "commit": commit(),
        "versions": versions(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads()},
    }
    judges = judge_totals(trainer.parts.directory.metrics_file)
    result |= {"judges_used": judges} if judges else {}
    write_json(out / "result.json", result)
    write_report(out)
    write_model_card(out / MODEL_FOLDER, out, card_model(trainer))
    return result


def _make_free(folder: Path) -> None:
    """Refuse to write a run among what is there already: nothing could tell the two apart later.

    What a run has left that never came to its first finished work goes.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir is {folder}, which is a file: choose a folder")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return
    if not is_free(folder):
        raise ConfigError(
            f"output_dir is {folder}, which is not empty ({', '.join(names[:4])}): choose another "
            "one, or pass --resume true to go on with the run in it"
        )
    with one_writer(folder):  # refused while that run is going on
        remove_leftovers(folder)


def evaluation_before(trainer: NEATTrainer) -> Evaluation:
    """The start policy on the held-out prompts; a resumed run reads what it measured before.

    Every rank calls it; the first one alone reads and writes, and all evaluate or none does. Raises
    ConfigError where it is not there and the policy is no longer the start policy.
    """
    path, ranks = trainer.output_dir / "evaluation-before.json", trainer.parts.ranks
    found = Evaluation(**read_json(path)) if ranks.is_rank_zero and path.is_file() else None
    measured = ranks.from_rank_zero(found)
    if measured is not None:
        return measured
    if trainer.state.global_step:
        raise ConfigError(
            f"{path} is missing, and the policy is that of step {trainer.state.global_step}, which "
            "is not the start policy: put the file back, or go on without held-out prompts "
            "(holdout: 0)"
        )
    trainer.evaluate(metric_key_prefix="before")
    evaluation = trainer.last_evaluation
    assert evaluation is not None
    ranks.run_on_rank_zero(
        lambda: write_json(path, evaluation.to_json()), "while it wrote the first evaluation"
    )
    return evaluation
