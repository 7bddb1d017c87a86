"""Bad input, row by row: a typed error that names the place and says what to change, or the
tolerance that is stated.

Nothing is sampled before a refusal: but for the rows that are about samples, the sampler is a
tripwire.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from neat_align import NEATConfig, NEATTrainer
from neat_align.cli.options import parse_options
from neat_align.comparison.spec import parse_spec
from neat_align.errors import (
    CollapseError,
    ConfigError,
    DataError,
    NEATError,
    PromptError,
    RewardError,
)
from neat_align.modeling.loading import load_policy
from neat_align.pipeline import run_training
from neat_align.prompts.instruction_banks import InstructionBank, InstructionPair, load_bank
from neat_align.prompts.loading import load_rows
from neat_align.prompts.rendering import prompt_ids
from neat_align.prompts.rows import PromptRow
from neat_align.reporting.run_report import write_report
from neat_align.rewards.hf import ModelReward
from neat_align.rewards.protocol import NamedReward
from neat_align.rewards.resolve import resolve_rewards
from neat_align.rewards.scoring import score
from neat_align.rounds.completions import Completion, CompletionGroup, Origin, read_groups
from neat_align.rounds.human_answers import answer_ids
from neat_align.rounds.make_round import make_round
from neat_align.rounds.params import RoundParams, RoundTools
from neat_align.sampling.protocol import Sample, SampleRequest, SamplingParams
from neat_align.sampling.transformers_sampler import TransformersSampler
from run_files import write_round
from tiny import CHATML, IM_END, NO_SYSTEM, save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
USER = {"role": "user", "content": "What do you say?"}
SYSTEM = {"role": "system", "content": "You are terse."}
TALK = [
    {"prompt": [{"role": "user", "content": f"What do you say to number {i}?"}]} for i in range(4)
]
ORIGINS: tuple[tuple[Origin, float], ...] = (("positive", 1.0), ("negative", 0.0))
LOGPROBS: dict[str, Any] = {"policy_logprobs": (-1.0, -1.0), "ref_logprobs": (-1.0, -1.0)}
HOSTILE = "NUL \0 and 👩‍👩‍👧 and <|im_end|>"
RAISES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% "
    "endif %}" + CHATML
)


@dataclass(frozen=True)
class Row:
    """An item of the list: what is fed, what comes of it, and words that it must say. `error` None
    is a tolerance, whose words are looked for in warnings and the log (and what `feed` asserts).
    """

    item: str
    feed: Callable[[Path], object]
    error: type[NEATError] | None
    words: tuple[str, ...] = ()
    samples: bool = False


# ---- what is fed ---------------------------------------------------------------------------------


def lines(*rows: Any, name: str = "bad.jsonl") -> Callable[[Path], list[PromptRow]]:
    """Read a file of these lines; what is not bytes is written as JSON."""

    def feed(folder: Path) -> list[PromptRow]:
        raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / name).write_bytes(b"".join(line + b"\n" for line in raw))
        return load_rows(folder / name)

    return feed


def expecting(feed: Callable[[Path], Any], expected: Any) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        assert [row.prompt for row in feed(folder)] == expected

    return check


def count_e(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    **columns: Any,
) -> list[float]:
    return [c[0]["content"].count("e") + 0.01 * len(c[0]["content"]) for c in completions]


def config(folder: Path, **changes: Any) -> NEATConfig:
    base: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "bf16": False,
        "prompts_per_round": 4,
        "num_train_epochs": 1,
        "max_prompt_length": 200,
        "max_completion_length": 6,
        "drift_prompts": 0,
        "disable_tqdm": True,
    }
    return NEATConfig(**(base | changes))


def setting(**changes: Any) -> Callable[[Path], NEATConfig]:
    return lambda folder: config(folder, **changes)


def trainer(
    rows: Any = TALK,
    tokenizer: Any = TOKENIZER,
    model: Any = None,
    reward: Any = count_e,
    **changes: Any,
) -> Callable[[Path], NEATTrainer]:
    def feed(folder: Path) -> NEATTrainer:
        policy = (
            model(folder) if model else tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER)
        )
        return NEATTrainer(
            policy,
            reward,
            config(folder, **changes),
            rows,
            processing_class=copy.deepcopy(tokenizer),
        )

    return feed


def recipe(text: str) -> Callable[[Path], Any]:
    def feed(folder: Path) -> Any:
        (folder / "r.yaml").write_text(text, encoding="utf-8")
        return parse_options(["--output_dir", str(folder / "run")], folder / "r.yaml")

    return feed


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def without_pad(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    built = trainer(tokenizer=tokenizer)(folder)
    assert built.processing_class.pad_token_id == TOKENIZER.eos_token_id


def encoder(folder: Path) -> object:
    shape = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    AutoModelForMaskedLM.from_config(BertConfig(**shape)).save_pretrained(folder / "bert")
    return load_policy(str(folder / "bert"))


def encoder_without_a_causal_class(folder: Path) -> object:
    AutoModelForMaskedLM.from_config(
        DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    ).save_pretrained(folder / "d")
    return load_policy(str(folder / "d"))


def encoder_decoder(folder: Path) -> object:
    shape = {
        "vocab_size": 40,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
    }
    small = BartConfig(
        **shape, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0
    )
    BartForConditionalGeneration(small).save_pretrained(folder / "bart")
    return load_policy(str(folder / "bart"))


def classifier_of_two(folder: Path) -> object:
    small = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(small).save_pretrained(folder / "judge")
    TOKENIZER.save_pretrained(folder / "judge")
    return resolve_rewards([str(folder / "judge")], None)


def adapter_of_another(**other: int) -> Callable[[Path], object]:
    """An adapter of a model of one size, whose file says that it belongs to a model of another."""

    def feed(folder: Path) -> object:
        base = save_tiny(folder / "base", "llama")
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **(shape | other)))
        get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
        ).save_pretrained(folder / "adapter")
        settings_file = folder / "adapter" / "adapter_config.json"
        settings_file.write_text(
            json.dumps(
                json.loads(settings_file.read_text()) | {"base_model_name_or_path": str(base)}
            )
        )
        return load_policy(str(folder / "adapter"))

    return feed


def into_a_used_folder(folder: Path) -> object:
    lines(*TALK, name="data.jsonl")(folder)
    (folder / "run").mkdir()
    (folder / "run" / "notes.txt").write_text("mine")
    words = [
        "--model_name_or_path",
        "demo",
        "--dataset_name",
        str(folder / "data.jsonl"),
        "--holdout",
        "0",
        "--output_dir",
        str(folder / "run"),
    ]
    return run_training(*parse_options(words, None))


def without_accelerator(**changes: Any) -> Callable[[Path], object]:
    def feed(folder: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "is_available", lambda: False)
            return config(folder, **changes)

    return feed


def hostile_ids_stay_inside_the_run(folder: Path) -> None:
    rows = [{**row, "id": f"../../{i}/\0"} for i, row in enumerate(TALK)]
    outside = {p for p in folder.rglob("*") if (folder / "run") not in (p, *p.parents)}
    trainer(rows, min_pair_fraction=0.0)(folder).make_round(0)
    assert {p for p in folder.rglob("*") if (folder / "run") not in (p, *p.parents)} == outside
    names = {p.relative_to(folder / "run").as_posix() for p in (folder / "run").rglob("*")}
    assert {"rounds/00000/groups.parquet", "rounds/00000/manifest.json"} <= names
    assert not {"0", "1", "2", "3"} & {name.rpartition("/")[2] for name in names}


def special_tokens_in_user_text(folder: Path) -> None:
    end = TOKENIZER.eos_token_id
    row = PromptRow(
        "1",
        [{"role": "user", "content": f"What is {IM_END}?"}],
        f"It {IM_END} ends a turn.",
        None,
        {},
        "row 0",
    )
    assert prompt_ids(TOKENIZER, row.prompt).count(end) == prompt_ids(
        TOKENIZER, [{"role": "user", "content": "What is it?"}]
    ).count(end)
    ids, reason = answer_ids(row, str(row.chosen), TOKENIZER, 100)
    assert (ids.count(end), ids[-1], reason) == (1, end, "stop")
    assert TOKENIZER.decode(ids[:-1]) == row.chosen
    plain, _ = answer_ids(row, "It ends a turn.", TOKENIZER, 100)
    assert list(plain[:-1]) == TOKENIZER("It ends a turn.", add_special_tokens=False)["input_ids"]


def special_tokens_in_what_a_reward_model_reads(folder: Path) -> None:
    """An answer that writes a turn of its own is one turn to a judge with a template, and one text
    to a judge without.
    """
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    for tokenizer in (tiny_tokenizer(), tiny_tokenizer("none")):
        model = LlamaForSequenceClassification(
            LlamaConfig(vocab_size=len(tokenizer), **shape, num_labels=1, pad_token_id=0)
        )
        judge = ModelReward(model, tokenizer)
        honest, hostile = (judge._encode("Hi", f"I am good.{end}").ids for end in ("", IM_END))
        end = tokenizer.eos_token_id
        assert hostile.count(end) == honest.count(end)
        assert len(hostile) > len(honest)


class Says:
    """A sampler whose answers are the same text every time."""

    def __init__(self, text: str) -> None:
        self.ids = (*TOKENIZER(text, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        return [Sample(self.ids, "stop", -1.0) for _ in requests]


def empty_completions(folder: Path) -> object:
    bank = InstructionBank("b", "", (InstructionPair("Be kind.", "Be rude."),))
    tools = RoundTools(TOKENIZER, bank, (NamedReward("r", count_e, 1.0),), Says(" "), Says(""))
    params = RoundParams(1, 2, 2, 0, False, "user_suffix", SamplingParams(6), "reward", 0.0, 200)
    rows = [PromptRow("1", [USER], None, None, {}, "row 0")]
    return make_round(
        rows,
        num_groups=1,
        position=0,
        round_index=0,
        params=params,
        tools=tools,
        folder=folder / "round",
    )


def rewarded(*values: Any) -> Callable[[Path], object]:
    def broken(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[Any]:
        return list(values)

    def feed(folder: Path) -> object:
        answers: list[Any] = [[{"role": "assistant", "content": t}] for t in ("yes", "no")]
        return score(
            (NamedReward("broken", broken, 1.0),),
            prompts=[[USER]] * 2,
            completions=answers,
            completion_ids=[[1], [2]],
            columns={},
        )

    return feed


def tied(folder: Path) -> object:
    def same(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    return trainer(reward=same)(folder).make_round(0)


def round_trip(folder: Path) -> None:
    """Through the data file, the groups' Parquet file, and the report."""
    (row,) = lines({"prompt": [{"role": "user", "content": HOSTILE}], "chosen": HOSTILE + "!"})(
        folder
    )
    assert (row.prompt, row.chosen) == ([{"role": "user", "content": HOSTILE}], HOSTILE + "!")
    answers = tuple(
        Completion(
            origin,
            0,
            f"{HOSTILE} {r}",
            (1, 2),
            "stop",
            origin,
            1,
            -1.0,
            reward=r,
            reward_components=(r,),
            **LOGPROBS,
        )
        for origin, r in ORIGINS
    )
    group = CompletionGroup("id \0 👩‍👩‍👧", row.prompt, (1, 2, 3), answers)
    write_round(folder / "run" / "rounds" / "00000", 0, [group])
    assert list(read_groups(folder / "run" / "rounds" / "00000" / "groups.parquet")) == [group]
    page = write_report(folder / "run").read_text(encoding="utf-8")
    assert "👩‍👩‍👧" in page
    assert "\0" not in page
    assert "&lt;|im_end|&gt;" in page


# ---- the list ------------------------------------------------------------------------------------

GOOD = {"prompt": "fine"}
ROWS = (
    Row(
        "missing file",
        lambda f: load_rows(f / "no.jsonl"),
        DataError,
        ("no.jsonl", "there is no such file", "check the path"),
    ),
    Row(
        "empty file",
        lines(),
        DataError,
        ("bad.jsonl", "it is empty", "a row with a prompt is needed"),
    ),
    Row(
        "broken JSON line",
        lines(GOOD, b'{"prompt": "x"'),
        DataError,
        ("bad.jsonl:2", "not valid JSON at column", "one object a line"),
    ),
    Row(
        "invalid UTF-8",
        lines(GOOD, b'{"prompt": "\xe9"}'),
        DataError,
        ("bad.jsonl:2", "(byte 0xe9)", "save the file as UTF-8"),
    ),
    Row("BOM", expecting(lines(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), ["fine"]), None),
    Row("BOM in a recipe", recipe("\ufefflearning_rate: 0.1\n"), None),
    Row(
        "lone surrogate",
        lines(GOOD, b'{"prompt": "\\ud83d"}'),
        DataError,
        ("bad.jsonl:2", "'prompt'", "U+D83D", "replace it"),
    ),
    Row("NUL and emoji", round_trip, None),
    Row(
        "prompt missing",
        lines(GOOD, {"text": "x"}),
        DataError,
        ("bad.jsonl:2", "prompt is missing", "give prompt"),
    ),
    Row(
        "prompt None",
        lines(GOOD, {"prompt": None}),
        DataError,
        ("bad.jsonl:2", "prompt is null", "must be text or a list of messages"),
    ),
    Row(
        "prompt blank",
        lines(GOOD, {"prompt": " \n"}),
        DataError,
        ("bad.jsonl:2", "prompt is blank", "write one, or drop the row"),
    ),
    Row(
        "prompt a number",
        lines(GOOD, {"prompt": 5}),
        DataError,
        ("bad.jsonl:2", "prompt is 5 (int)", "must be text"),
    ),
    Row(
        "unknown role",
        lines({"prompt": [{"role": "function", "content": "x"}]}),
        DataError,
        ("bad.jsonl:1", "prompt[0].role is 'function'", "rename the role"),
    ),
    Row(
        "content None",
        lines({"prompt": [{"role": "user", "content": None}]}),
        DataError,
        ("bad.jsonl:1", "prompt[0].content is null", "must be text"),
    ),
    Row(
        "no messages",
        lines({"prompt": []}),
        DataError,
        ("bad.jsonl:1", "prompt is an empty list", "add a message"),
    ),
    Row(
        "last turn assistant",
        lines({"prompt": [USER, {"role": "assistant", "content": "x"}]}),
        DataError,
        ("bad.jsonl:1", "prompt ends with an assistant message", "split it off into chosen"),
    ),
    Row(
        "roles the template refuses",
        trainer([*TALK, {"prompt": [SYSTEM, USER]}], with_template(RAISES)),
        PromptError,
        ("row 4: prompt", "turns system, user", "System role not supported", "change this row"),
    ),
    Row(
        "duplicate ids",
        lines({"id": 1, **GOOD}, {"id": "1", "prompt": "b"}),
        DataError,
        ("bad.jsonl:2: id '1'", "make ids unique"),
    ),
    Row(
        "duplicate prompts",
        lines(GOOD, {**GOOD, "n": 1}),
        None,
        ("1 of 2 rows repeat an earlier prompt", "bad.jsonl:2", "drop them"),
    ),
    Row(
        "chosen = rejected",
        lines(GOOD, {"prompt": "x", "chosen": "a", "rejected": "a"}),
        DataError,
        ("bad.jsonl:2", "chosen and rejected are the same", "drop the row"),
    ),
    Row(
        "mixed column types",
        lines(GOOD, {"prompt": [USER]}),
        DataError,
        ("bad.jsonl:2: prompt is messages, but text at", "use one form"),
    ),
    Row(
        "mixed forms in training and held-out data",
        lambda f: NEATTrainer(
            tiny_model("llama", len(TOKENIZER), tokenizer=TOKENIZER),
            count_e,
            config(f),
            TALK,
            [GOOD],
            processing_class=TOKENIZER,
        ),
        DataError,
        ("dataset 'eval_dataset', row 0: prompt is text, but messages", "use one form"),
    ),
    Row(
        "prompt over the context",
        trainer(max_prompt_length=20),
        DataError,
        (
            "'train_dataset', row 0",
            "longer than max_prompt_length=20",
            "Raise it",
            "or drop the rows",
        ),
    ),
    Row(
        "prompt + completion over the context",
        trainer(max_prompt_length=510),
        ConfigError,
        ("max_prompt_length + max_completion_length is 516", "context of 512 tokens", "lower one"),
    ),
    Row("no pad token", without_pad, None, ("has no pad token: '<|im_end|>' is used",)),
    Row(
        "no chat template",
        trainer(tokenizer=tiny_tokenizer("none")),
        PromptError,
        ("has no chat template", "use an instruct model"),
    ),
    Row(
        "template drops the system turn with the instruction",
        trainer(tokenizer=with_template(NO_SYSTEM), instruction_placement="system"),
        PromptError,
        (
            "pairs[1] of bank",
            "drops or changes the system instruction",
            "set instruction_placement to user_suffix",
        ),
    ),
    Row(
        "template drops the data's system turn",
        trainer([*TALK, {"prompt": [SYSTEM, USER]}], with_template(NO_SYSTEM)),
        PromptError,
        (
            "row 4: prompt",
            "drops or changes the system turn prompt[0] ('You are terse.')",
            "move its text into the user turn",
        ),
    ),
    Row(
        "equal polarity prompts",
        lambda f: (
            (f / "b.yaml").write_text("pairs: [{positive: Be  Good, negative: be good}]"),
            load_bank(str(f / "b.yaml")),
        ),
        PromptError,
        ("b.yaml: pairs[1]", "positive and negative are the same", "change one"),
    ),
    Row(
        "tokenizer larger than embeddings",
        trainer(model=lambda f: tiny_model("llama", 100)),
        ConfigError,
        ("token ids up to 383", "embeddings for 100 tokens", "pass the model's own tokenizer"),
    ),
    Row(
        "encoder as policy",
        encoder,
        ConfigError,
        ("bert is an encoder (bert)", "name a causal (decoder-only) language model"),
    ),
    Row(
        "encoder without a causal class",
        encoder_without_a_causal_class,
        ConfigError,
        ("is an encoder (distilbert)", "name a causal"),
    ),
    Row(
        "encoder-decoder as policy",
        encoder_decoder,
        ConfigError,
        ("bart is an encoder-decoder (bart)", "name a causal"),
    ),
    Row(
        "no such model",
        lambda f: load_policy(str(f / "none")),
        ConfigError,
        ("the model", "none: there is no such file or folder", "check the path"),
    ),
    Row(
        "num_labels 2",
        classifier_of_two,
        RewardError,
        ("judge", "has 2 labels", "num_labels 1", "write a reward function"),
    ),
    Row(
        "adapter for a wider base",
        adapter_of_another(hidden_size=64),
        ConfigError,
        ("adapter does not fit its base model", "size mismatch", "correct base_model_name_or_path"),
    ),
    Row(
        "adapter for a shallower base",
        adapter_of_another(num_hidden_layers=1),
        ConfigError,
        ("adapter does not fit its base model", "missing or left over", "choose another adapter"),
    ),
    Row(
        "unknown key",
        recipe("seed: 1\nlearning_rat: 1\n"),
        ConfigError,
        ("r.yaml:2: unknown option 'learning_rat'", "'learning_rate'?"),
    ),
    Row(
        "key given twice",
        recipe("seed: 1\nseed: 2\n"),
        ConfigError,
        ("r.yaml:2: 'seed' is also on line 1", "keep one"),
    ),
    Row(
        "lr: 1e-5 as text",
        lambda f: _is(recipe("learning_rate: 1e-5\n")(f)[1].learning_rate, 1e-5),
        None,
    ),
    Row(
        "lr: 1e-5 as text in Python",
        lambda f: _is(config(f, learning_rate="1e-5").learning_rate, 1e-5),
        None,
    ),
    Row(
        "lr: fast",
        recipe("seed: 1\nlearning_rate: fast\n"),
        ConfigError,
        ("r.yaml:2: ", "learning_rate", "'fast'", "correct"),
    ),
    Row(
        "lr NaN",
        setting(learning_rate=math.nan),
        ConfigError,
        ("learning_rate is nan", "finite number"),
    ),
    Row(
        "fewer than two completions",
        setting(num_positive=1, num_negative=0, num_plain=0, use_human_completions=False),
        ConfigError,
        ("num_positive, num_negative and num_plain add up to 1", "ask for two or more"),
    ),
    Row(
        "fewer than two completions with this data",
        trainer(num_positive=1, num_negative=0, num_plain=0),
        ConfigError,
        ("add up to 1 and no row has an answer of its own", "ask for two or more"),
    ),
    Row(
        "temperature 0",
        setting(temperature=0.0),
        ConfigError,
        ("temperature is 0.0", "must be above 0", "nothing to rank"),
    ),
    Row(
        "rounds 0",
        recipe("num_train_epochs: 0\n"),
        ConfigError,
        ("r.yaml:1: num_train_epochs is 0", "1 or more"),
    ),
    Row(
        "lr < 0",
        recipe("seed: 1\nlearning_rate: -1.0\n"),
        ConfigError,
        ("r.yaml:2: learning_rate is -1.0", "must not be negative"),
    ),
    Row("seed < 0", setting(seed=-1), ConfigError, ("seed is -1", "from 0 to")),
    Row(
        "non-empty output folder",
        into_a_used_folder,
        ConfigError,
        (
            "output_dir is",
            "run, which is not empty (notes.txt)",
            "choose another one, or pass --resume true",
        ),
    ),
    Row("`../` in prompt ids", hostile_ids_stay_inside_the_run, None, samples=True),
    Row(
        "`../` in a method's name",
        lambda f: parse_spec({"settings": {}, "methods": {"../../x": {"like": "neat"}}}, "c.yaml"),
        ConfigError,
        ("c.yaml: the method is '../../x'", "it names a folder", "use letters"),
    ),
    Row(
        "`/` in a comparison's name",
        lambda f: parse_spec(
            {"name": "/etc/x", "settings": {}, "methods": {"neat": None}}, "c.yaml"
        ),
        ConfigError,
        ("c.yaml: name is '/etc/x'", "it names a folder", "use letters"),
    ),
    Row(
        "`../` in a data set's name",
        lambda f: load_rows("../nothing/at-all"),
        DataError,
        ("../nothing/at-all", "no such file", "check"),
    ),
    Row(
        "CUDA absent",
        without_accelerator(use_cpu=False),
        ConfigError,
        ("use_cpu is false", "leave use_cpu out"),
    ),
    Row(
        "fp16 on the CPU",
        without_accelerator(fp16=True),
        ConfigError,
        ("fp16 is true and the run is on the CPU", "remove fp16"),
    ),
    Row(
        "fp16 beside bf16",
        without_accelerator(fp16=True, bf16=True),
        ConfigError,
        ("fp16 and bf16 are both true", "set bf16 to false"),
    ),
    Row(
        "an option that nothing reads",
        recipe("seed: 1\nper_device_eval_batch_size: 16\n"),
        ConfigError,
        ("r.yaml:2: per_device_eval_batch_size is read by nothing", "leave it out"),
    ),
    Row(
        "sharded weights",
        recipe("fsdp: true\nuse_cpu: true\n"),
        ConfigError,
        ("r.yaml:1: fsdp is set and the run is on a CPU", "train as plain data parallelism"),
    ),
    Row("special tokens inside user text", special_tokens_in_user_text, None),
    Row(
        "special tokens in what a reward model reads",
        special_tokens_in_what_a_reward_model_reads,
        None,
    ),
    Row(
        "empty completions",
        empty_completions,
        CollapseError,
        ("0 of 1 prompts", "4 empty answers were left out"),
        samples=True,
    ),
    Row(
        "blank human answers",
        lines({"prompt": "x", "chosen": " "}),
        None,
        ("1 of 1 rows have a blank chosen or rejected", "bad.jsonl:1"),
    ),
    Row(
        "reward NaN",
        rewarded(1.0, math.nan),
        RewardError,
        ("'broken' returned nan, for row 1", "return a finite number, or None"),
    ),
    Row(
        "reward +inf",
        rewarded(math.inf, 1.0),
        RewardError,
        ("'broken' returned inf, for row 0", "return a finite number"),
    ),
    Row(
        "reward -inf",
        rewarded(-math.inf, 1.0),
        RewardError,
        ("'broken' returned -inf, for row 0", "return a finite number"),
    ),
    Row(
        "reward a string",
        rewarded(1.0, "good"),
        RewardError,
        ("'broken' returned str 'good'", "row 1", "return a finite number"),
    ),
    Row(
        "rewards of the wrong length",
        rewarded(1.0),
        RewardError,
        ("returned 1 scores for 2 completions", "one a completion"),
    ),
    Row(
        "all rewards tied",
        tied,
        CollapseError,
        ("0 of 4 prompts gave two completions", "try another reward"),
        samples=True,
    ),
)


def _is(found: object, expected: object) -> None:
    assert found == expected


@pytest.mark.parametrize("row", ROWS, ids=[row.item for row in ROWS])
def test_bad_input(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not row.samples:

        def tripwire(*args: Any, **kwargs: Any) -> list[Sample]:
            raise AssertionError("sampled before the input was checked")

        monkeypatch.setattr(TransformersSampler, "sample", tripwire)
    with (
        warnings.catch_warnings(record=True) as caught,
        caplog.at_level(logging.WARNING, logger="neat_align"),
    ):
        warnings.simplefilter("always")
        if row.error is None:
            row.feed(tmp_path)
            said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)] + [
                r.getMessage() for r in caplog.records
            ]
            for word in row.words:
                assert sum(word in s for s in said) == 1, (word, said)  # once
            return
        with pytest.raises(row.error) as refused:
            row.feed(tmp_path)
    assert type(refused.value) is row.error
    for word in row.words:
        assert word in str(refused.value)
