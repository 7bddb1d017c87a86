"""Leaving out completions that no term of the loss reads changes no gradient; best against worst,
and the LM loss alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neat_align import ConfigError, NEATConfig, NEATTrainer
from neat_align.learning.batches import without_unread_completions
from neat_align.prompts.loading import rows_from_dataset
from neat_align.rounds.completions import Completion, CompletionGroup, Origin
from tiny import FAMILIES, Family, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
LAYOUTS = {"packed": "auto", "padded": "off"}


def letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(c[0]["content"])) for c in completions]


def trainer(folder: Path, family: Family = "llama", **changes: Any) -> NEATTrainer:
    settings: dict[str, Any] = {
        "bf16": False,
        "max_prompt_length": 200,
        "max_completion_length": 10,
        "drift_prompts": 0,
        "disable_tqdm": True,
        "lm_weight": 1.0,
        "kl_weight": 0.0,
    }
    config = NEATConfig(output_dir=str(folder), **settings | changes)
    rows = rows_from_dataset(
        [{"prompt": [{"role": "user", "content": f"Number {i}?"}]} for i in range(2)]
    )
    return NEATTrainer(
        tiny_model(family, len(TOKENIZER), tokenizer=TOKENIZER),
        letters,
        config,
        rows,
        processing_class=TOKENIZER,
    )


def group(name: str, *members: tuple[Origin, float | None, int, bool]) -> CompletionGroup:
    """(origin, reward, number of tokens, whether it was cut) a completion; tokens and reference
    log-probabilities at random.
    """
    generator = torch.Generator().manual_seed(len(name) + len(members))
    completions = []
    for i, (origin, reward, n, cut) in enumerate(members):
        ids = torch.randint(5, 300, (n,), generator=generator).tolist()
        ids = ids if cut else [*ids[:-1], EOS]
        ref = tuple((-3 * torch.rand(n, generator=generator)).tolist())
        completions.append(
            Completion(
                origin,
                i,
                f"{name}{i}",
                tuple(ids),
                "length" if cut else "stop",
                ref_logprobs=ref,
                reward=reward,
            )
        )
    return CompletionGroup(name, "Q", (7, 8, 9, 10 + len(name)), tuple(completions))


GROUPS = [
    # The best, the worst and the target are three.
    group(
        "a",
        ("plain", 1.0, 4, False),
        ("positive", 5.0, 6, True),
        ("negative", -2.0, 3, False),
        ("chosen", 2.0, 5, False),
    ),
    # The best is the target; what abstained is nothing.
    group(
        "bb",
        ("negative", 0.0, 2, False),
        ("plain", None, 7, False),
        ("rejected", 4.0, 5, True),
        ("positive", 9.0, 4, False),
    ),
    # No pair (a tie), but a target.
    group("ccc", ("positive", 1.0, 4, False), ("plain", 1.0, 2, False), ("chosen", 1.0, 3, False)),
    # A pair, but no target: bad or cut.
    group(
        "dddd",
        ("negative", 3.0, 4, False),
        ("rejected", 1.0, 3, False),
        ("negative", 2.0, 5, False),
        ("positive", 0.5, 3, True),
    ),
    # Neither.
    group("eeeee", ("negative", None, 4, False), ("positive", None, 3, True)),
]


def gradient(t: NEATTrainer, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    t.policy.zero_grad(set_to_none=True)
    loss = t.compute_loss(t.policy, {"micro_batch": batch})
    loss.backward()
    return float(loss.detach()), {
        name: p.grad.clone() for name, p in t.policy.named_parameters() if p.grad is not None
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    scale = max(float(g.norm()) for g in expected.values())
    for name, wanted in expected.items():
        assert float((found[name] - wanted).norm()) < 1e-5 * scale, name


BEST_WORST = [
    {"ranking_loss": "logistic", "lm_weight": 0.0},
    {"ranking_loss": "logistic", "rank_by": "origin_then_reward", "reward_margin": 0.9},
    {
        "ranking_loss": "hinge",
        "hinge_margin": 3.0,
        "length_power": 0,
        "lm_on_cut_completions": True,
    },
    {"ranking_loss": "dpo", "lm_on_bad_origins": True, "rank_by": "origin"},
    {
        "ranking_loss": "listwise",
        "reward_margin": 2.0,
        "lm_on_bad_origins": True,
        "lm_on_cut_completions": True,
    },
    {"ranking_loss": "kto", "beta": 0.3, "lm_weight": 0.0},
    {"ranking_loss": "logistic", "kl_weight": 0.5},  # reads every completion
]
ONLY_LM: list[dict[str, Any]] = [
    {},
    {"lm_on_cut_completions": True},
    {"lm_on_bad_origins": True, "rank_by": "origin_then_reward"},
]
ONLY_LM += [{"kl_weight": 0.5}, {"negative_penalty": "unlikelihood", "negative_weight": 0.5}]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        *({"pair_selection": "best_worst", **c} for c in BEST_WORST),
        *({"ranking_loss": "none", **c} for c in ONLY_LM),
    ],
    ids=str,
)
def test_what_is_left_out_had_no_gradient(
    tmp_path: Path, changes: dict[str, Any], layout: str
) -> None:
    t = trainer(tmp_path, prefix_sharing=LAYOUTS[layout], **changes)
    assert t.parts.policies.layout == layout
    engine = t.parts.engine
    whole, (batch,) = engine.micro_batch(GROUPS), engine.collate(GROUPS)["micro_batches"]
    if t.args.ranking_loss != "none":
        assert engine.count([batch]).ranking == engine.count([whole]).ranking
    if t.args.lm_weight:
        assert engine.count([batch]).lm == engine.count([whole]).lm
    loss, found = gradient(t, batch)
    expected_loss, expected = gradient(t, whole)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (
            {"pair_selection": "best_worst"},
            ["a1 a2 a3", "bb0 bb3", "ccc0", "dddd0 dddd3", "eeeee0"],
        ),
        (
            {"pair_selection": "best_worst", "lm_weight": 0.0},
            ["a1 a2", "bb0 bb3", "ccc0", "dddd0 dddd3", "eeeee0"],
        ),
        (
            {"pair_selection": "best_worst", "lm_on_cut_completions": True},
            ["a1 a2", "bb0 bb3", "ccc0", "dddd0 dddd3", "eeeee0"],
        ),
        (
            {"pair_selection": "best_worst", "reward_margin": 2.5},
            ["a1 a2 a3", "bb0 bb3", "ccc0", "dddd0", "eeeee0"],
        ),
        (
            {"pair_selection": "best_worst", "rank_by": "origin_then_reward"},
            ["a1 a2 a3", "bb0 bb3", "ccc0", "dddd1 dddd3", "eeeee0"],
        ),
        ({"ranking_loss": "none"}, ["a3", "bb3", "ccc0", "dddd0", "eeeee0"]),
        (
            {"ranking_loss": "none", "lm_on_cut_completions": True},
            ["a1", "bb3", "ccc0", "dddd3", "eeeee0"],
        ),
        (
            {},
            [
                "a0 a1 a2 a3",
                "bb0 bb1 bb2 bb3",
                "ccc0 ccc1 ccc2",
                "dddd0 dddd1 dddd2 dddd3",
                "eeeee0 eeeee1",
            ],
        ),
    ],
    ids=str,
)
def test_what_is_kept_by_hand(tmp_path: Path, changes: dict[str, Any], kept: list[str]) -> None:
    t = trainer(tmp_path, **changes)
    assert [
        " ".join(c.text for c in without_unread_completions(g, t.args).completions) for g in GROUPS
    ] == kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cut", [False, True])
def test_without_a_ranking_loss_the_gradient_is_that_of_the_targets_likelihood(
    tmp_path: Path, family: Family, layout: str, cut: bool
) -> None:
    """Mean over the groups with a target of the mean token NLL of that target, one row at a time,
    times lm_weight.
    """
    t = trainer(
        tmp_path,
        family,
        ranking_loss="none",
        lm_weight=0.7,
        prefix_sharing=LAYOUTS[layout],
        lm_on_cut_completions=cut,
    )
    (batch,) = t.parts.engine.collate(GROUPS)["micro_batches"]
    loss, found = gradient(t, batch)
    targets = [(0, 1), (1, 3), (2, 0), (3, 3)] if cut else [(0, 3), (1, 3), (2, 0)]
    losses = []
    for g, k in targets:
        prompt, answer = GROUPS[g].prompt_ids, GROUPS[g].completions[k].token_ids
        logps = t.policy(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        losses.append(-logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).mean())
    t.policy.zero_grad(set_to_none=True)
    expected = 0.7 * torch.stack(losses).mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    assert_same(
        found, {name: p.grad for name, p in t.policy.named_parameters() if p.grad is not None}
    )


@pytest.mark.parametrize(
    "changes",
    [{"ranking_loss": "none"}, {"pair_selection": "best_worst", "ranking_loss": "dpo"}],
    ids=str,
)
def test_a_run_of_each_kind_trains_and_says_what_it_ranked(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    import json

    t = trainer(
        tmp_path,
        num_train_epochs=1,
        prompts_per_round=2,
        lm_on_cut_completions=True,
        learning_rate=1e-2,
        **changes,
    )
    before = {k: v.clone() for k, v in t.policy.state_dict().items()}
    t.train()
    assert any(not torch.equal(v, before[k]) for k, v in t.policy.state_dict().items())
    steps = [
        line
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]
    ranked = [line["loss/ranking"] for line in steps]
    assert (
        all(v == 0 for v in ranked)
        if changes["ranking_loss"] == "none"
        else all(v > 0 for v in ranked)
    )
    assert all(line["loss/lm"] > 0 for line in steps)


def test_a_margin_that_would_undo_the_origins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"reward_margin is 1\.0 and rank_by is origin_then_reward.*below 1"
    ):
        trainer(tmp_path, rank_by="origin_then_reward", reward_margin=1.0)
    trainer(tmp_path, rank_by="origin_then_reward", reward_margin=0.9)
