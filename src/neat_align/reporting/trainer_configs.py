"""What to tell a trainer so that it reads an exported file: a few lines, as its documentation has
them. Sources: `rounds/trainer_rows.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neat_align.rounds.exports import RowForm
from neat_align.rounds.trainer_rows import TrainerName

TITLES: dict[TrainerName, str] = {
    "trl": "TRL",
    "openrlhf": "OpenRLHF",
    "axolotl": "axolotl",
    "llamafactory": "LLaMA-Factory",
}


@dataclass(frozen=True)
class TrainerConfig:
    """Lines for a trainer: their language, the text, and files that go beside the data."""

    language: str
    text: str
    files: tuple[tuple[str, str], ...] = ()


def trainer_config(
    trainer: TrainerName, form: RowForm, file: Path, *, conversational: bool
) -> TrainerConfig | None:
    """What the trainer is told to read rows of this form; None for ranked lists, which none reads.

    `file` is a .jsonl or .parquet file, named as whoever trains will name it.
    """
    if form == "ranked":
        return None
    if trainer == "trl":
        return TrainerConfig("python", _trl(form, file))
    if trainer == "openrlhf":
        return TrainerConfig("bash", _openrlhf(form, file, conversational=conversational))
    if trainer == "axolotl":
        return TrainerConfig("yaml", _axolotl(form, file, conversational=conversational))
    return _llama_factory(form, file, conversational=conversational)


def _builder(file: Path) -> str:
    return "json" if file.suffix == ".jsonl" else "parquet"


_TRL_NAMES = {"preference": "DPO", "kto": "KTO", "sft": "SFT", "reward": "Reward"}


def _trl(form: RowForm, file: Path) -> str:
    name = _TRL_NAMES[form]
    return (
        "from datasets import load_dataset\n"
        f"from trl import {name}Config, {name}Trainer\n\n"
        f'data = load_dataset("{_builder(file)}", data_files="{file}", split="train")\n'
        f'args = {name}Config(output_dir="trained")\n'
        f'{name}Trainer(model="MODEL", args=args, train_dataset=data).train()'
    )


def _openrlhf(form: RowForm, file: Path, *, conversational: bool) -> str:
    command = {"preference": "train_dpo", "sft": "train_sft", "reward": "train_rm"}[form]
    keys = {
        "preference": "--data.prompt_key prompt --data.chosen_key chosen "
        "--data.rejected_key rejected",
        "sft": "--data.input_key prompt --data.output_key completion",
        "reward": "--data.chosen_key chosen --data.rejected_key rejected",
    }[form]
    template = ""
    if conversational:
        template = " \\\n    --data.apply_chat_template"
    elif form == "sft":  # its default puts "User:" before a prompt
        template = " \\\n    --data.input_template '{}'"
    return (
        f"deepspeed --module openrlhf.cli.{command} \\\n    --data.dataset {file} \\\n"
        f"    {keys}{template} \\\n    --actor.model_name_or_path MODEL"
    )


def _axolotl(form: RowForm, file: Path, *, conversational: bool) -> str:
    head = f"datasets:\n  - path: {file}\n    ds_type: {_builder(file)}\n"
    if form == "preference":
        fields = (
            "    type: chat_template.default"
            if conversational
            else _user_defined("prompt", "chosen", "rejected")
        )
        return f"rl: dpo\n{head}{fields}"
    if form == "kto":
        fields = (
            "    type: chatml.ultra  # llama3.ultra for a Llama 3 template"
            if conversational
            else _user_defined("prompt", "completion") + "\n      field_label: label"
        )
        return f"rl: kto\nremove_unused_columns: false\n{head}{fields}"
    if form == "reward":
        return (
            "model_type: AutoModelForSequenceClassification\nnum_labels: 1\nreward_model: true\n"
            f"{head}    type: bradley_terry.chat_template"
        )
    if conversational:  # empty: the last turn alone is learned
        return f"{head}    type: chat_template\n    roles_to_train:\n    train_on_eos:"
    return (
        f"{head}    type:\n      field_instruction: prompt\n      field_output: completion\n"
        '      format: "{instruction}"\n      no_input_format: "{instruction}"'
    )


def _user_defined(*names: str) -> str:
    lines = [f"      field_{name}: {name}" for name in names]
    lines += [f'      {name}_format: "{{{name}}}"' for name in names]
    return "\n".join(["    type:", *lines])


def _llama_factory(form: RowForm, file: Path, *, conversational: bool) -> TrainerConfig:
    stage = {"preference": "dpo", "kto": "kto", "sft": "sft", "reward": "rm"}[form]
    name = file.stem
    described = dataset_info(form, file.name, conversational=conversational)
    last_turn = "mask_history: true\n" if form == "sft" and conversational else ""
    text = (
        f"dataset_dir: {file.parent}  # where {file.name} and dataset_info.json are\n"
        f"dataset: {name}\nstage: {stage}\n{last_turn}template: YOURS"
    )
    info = json.dumps({name: described}, indent=2)
    return TrainerConfig("yaml", text, (("dataset_info.json", info),))


def dataset_info(form: RowForm, file_name: str, *, conversational: bool) -> dict[str, Any]:
    """LLaMA-Factory's description of the file, a value of `dataset_info.json`."""
    columns = {
        "preference": {"chosen": "chosen", "rejected": "rejected"},
        "reward": {"chosen": "chosen", "rejected": "rejected"},
        "kto": {"kto_tag": "label"},
        "sft": {},
    }[form]
    info: dict[str, Any] = {"file_name": file_name}
    if form in ("preference", "reward"):
        info["ranking"] = True
    if conversational:
        info["formatting"] = "sharegpt"
        info["columns"] = {"messages": "messages", **columns}
        info["tags"] = {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        }
        return info
    answer = {} if form in ("preference", "reward") else {"response": "completion"}
    info["columns"] = {"prompt": "prompt", **answer, **columns}
    return info
