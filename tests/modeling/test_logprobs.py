from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, PreTrainedModel, Qwen2MoeConfig
from transformers.modeling_outputs import CausalLMOutput

from neat_align.modeling import chunked_head, kl, logprobs
from neat_align.modeling.head_inputs import completion_logits, head_inputs
from neat_align.modeling.kl import Divergence, exact_divergence
from neat_align.modeling.layout import choose_layout
from neat_align.modeling.logprobs import completion_logprobs, score_completions
from neat_align.modeling.packing import Layout, pack_rows, pad_rows
from neat_align.modeling.precision import inference
from neat_align.modeling.reference import adapter_is_zero
from tiny import FAMILIES, Family, random_model, tiny_model

VOCAB, PAD = 40, 0
# Of unlike lengths, one of a single token, with the pad token (0) as content at every edge of
# prompt and completion.
PROMPTS = [[5, 6, 7, 8, 9], [PAD], [PAD, 11, PAD], [12, 13, 14, 15, 16, 17, 18, 19]]
COMPLETIONS = [[20, 2], [PAD, 21, PAD], [22, 23, 24, 25, 26, 2], [PAD]]


def model_of(family: Family, seed: int = 0) -> PreTrainedModel:
    return cast("PreTrainedModel", tiny_model(family, VOCAB, seed).eval())  # eval: gpt2 has dropout


def one_row(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-softmax over the vocabulary at each completion token.

    One sequence, no padding, no mask, no position ids.
    """
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return cast("torch.Tensor", logits[len(prompt) - 1 : -1].log_softmax(-1))


def reference_logps(model: torch.nn.Module) -> list[torch.Tensor]:
    return [
        one_row(model, p, c).gather(-1, torch.tensor(c)[:, None]).squeeze(-1)
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]


# ---- padded rows against one row at a time -------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_give_the_log_probabilities_of_single_rows(family: Family) -> None:
    model = model_of(family)
    logps = completion_logprobs(model, pad_rows(PROMPTS, COMPLETIONS, PAD))
    for row, expected in zip(logps, reference_logps(model), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)
        assert not row[len(expected) :].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [3, 512])
def test_padded_rows_give_the_gradients_of_single_rows(
    family: Family, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", chunk)
    model = model_of(family)
    weights = [0.3, -1.0, 2.0, 0.7]
    batched = completion_logprobs(model, pad_rows(PROMPTS, COMPLETIONS, PAD)).sum(-1)
    (batched * torch.tensor(weights)).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch.stack(
        [w * row.sum() for w, row in zip(weights, reference_logps(model), strict=True)]
    ).sum().backward()
    for name, p in model.named_parameters():
        grad = got[name]
        if p.grad is None or not p.grad.any():
            assert grad is None or not grad.any(), name
            continue
        assert grad is not None, name
        assert float((grad - p.grad).norm() / p.grad.norm()) < 1e-5, name


@pytest.mark.parametrize("pad", [1, 2, 39])
def test_which_token_pads_does_not_matter(pad: int) -> None:
    model = model_of("llama")
    expected = completion_logprobs(model, pad_rows(PROMPTS, COMPLETIONS, PAD))
    torch.testing.assert_close(
        completion_logprobs(model, pad_rows(PROMPTS, COMPLETIONS, pad)), expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 23, 24, 25])
def test_chunks_of_the_head_change_nothing(
    chunk: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = model_of("qwen2"), pad_rows(PROMPTS, COMPLETIONS, PAD)
    assert rows.completion_ids.numel() == 24
    with torch.no_grad():
        expected = completion_logprobs(model, rows)
    monkeypatch.setattr(logprobs, "HEAD_CHUNK", chunk)
    with torch.set_grad_enabled(grad):
        got = completion_logprobs(model, rows)
    assert got.requires_grad is grad
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=1e-6)


def test_log_probabilities_are_fp32_under_autocast() -> None:
    model, rows = model_of("llama"), pad_rows(PROMPTS, COMPLETIONS, PAD)
    exact = completion_logprobs(model, rows)
    with torch.autocast("cpu", torch.bfloat16):
        half = completion_logprobs(model, rows)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)  # autocast was on
    torch.testing.assert_close(half, exact, rtol=0, atol=0.2)


class AllLogits(torch.nn.Module):
    """A model whose forward knows no `logits_to_keep`."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> CausalLMOutput:
        logits = self.inner(input_ids=input_ids, use_cache=use_cache).logits
        return CausalLMOutput(logits=logits)


def test_a_model_that_cannot_keep_some_logits_is_sliced() -> None:
    model, rows = model_of("llama"), pad_rows(PROMPTS, COMPLETIONS, PAD)
    expected = completion_logits(model, rows)
    assert expected.shape == (4, 6, VOCAB)
    torch.testing.assert_close(
        completion_logits(AllLogits(model), rows), expected, rtol=0, atol=1e-6
    )


def test_only_the_completions_logits_are_computed_behind_wrappers_too() -> None:
    rows = pad_rows(PROMPTS, COMPLETIONS, PAD)
    adapter = get_peft_model(
        model_of("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    for model in (
        model_of("llama"),
        adapter,
        torch.nn.DataParallel(model_of("gpt2")),
        torch.nn.DataParallel(adapter),
    ):
        kept: list[int] = []
        model.register_forward_hook(
            lambda _, __, output, kept=kept: kept.append(output.logits.shape[1])
        )
        completion_logits(model, rows)
        assert kept == [6]  # six completion tokens, of nine positions


# ---- prompt tokens are never in a loss -----------------------------------------------------------


def test_no_gradient_reaches_the_logits_of_prompt_tokens_or_padding() -> None:
    model, rows = AllLogits(model_of("llama")), pad_rows(PROMPTS, COMPLETIONS, PAD)
    seen: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: object, output: CausalLMOutput) -> None:
        assert output.logits is not None
        output.logits.retain_grad()
        seen.append(output.logits)

    model.register_forward_hook(keep)
    completion_logprobs(model, rows).sum().backward()
    (logits,) = seen
    assert logits.grad is not None
    width = rows.input_ids.shape[1]
    for r, (p, c) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        # The last prompt position, and all but the last token.
        predicts = set(range(len(p) - 1, len(p) - 1 + len(c)))
        touched = {t for t in range(width) if logits.grad[r, t].any()}
        assert touched == predicts, (p, c)


def test_the_prompts_own_tokens_are_not_scored() -> None:
    # An embedding and a head, no attention: what a position predicts depends on the token before it
    # alone.
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
            return CausalLMOutput(logits=self.table(input_ids))

    model = Bigram()
    a = completion_logprobs(model, pad_rows([[5, 6, 7]], [[8, 9]], PAD))
    assert torch.equal(a, completion_logprobs(model, pad_rows([[30, 31, 7]], [[8, 9]], PAD)))
    # The last one predicts.
    assert not torch.equal(a, completion_logprobs(model, pad_rows([[5, 6, 31]], [[8, 9]], PAD)))


# ---- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 25, 4096])
def test_scores_come_in_order_whatever_the_budget(max_tokens: int, layout: Layout) -> None:
    model = model_of("gpt2").train()
    scores = score_completions(
        model,
        PROMPTS,
        COMPLETIONS,
        layout=layout,
        pad_token_id=PAD,
        max_tokens=max_tokens,
        autocast_dtype=None,
    )
    assert model.training  # put back, and dropout was off:
    model.eval()
    assert [len(s) for s in scores] == [len(c) for c in COMPLETIONS]
    for got, expected in zip(scores, reference_logps(model), strict=True):
        assert got == pytest.approx(expected.tolist(), abs=1e-5)


def test_completions_of_one_prompt_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    by_row = [(one_row(model, p, c), c) for p, c in zip(prompts, COMPLETIONS, strict=True)]
    expected = [
        table.gather(-1, torch.tensor(c)[:, None]).squeeze(-1).tolist() for table, c in by_row
    ]
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0].numel())
    )
    for group_size, copies in ((logprobs.SCORING_GROUP, 1), (2, 2)):
        fed.clear()
        monkeypatch.setattr(logprobs, "SCORING_GROUP", group_size)
        scores = score_completions(
            model, prompts, COMPLETIONS, layout="packed", pad_token_id=PAD, autocast_dtype=None
        )
        assert sum(fed) == copies * len(PROMPTS[0]) + len(PROMPTS[1]) + sum(
            len(c) - 1 for c in COMPLETIONS
        )
        for got, wanted in zip(scores, expected, strict=True):
            assert got == pytest.approx(wanted, abs=1e-5)


def test_nothing_to_score_gives_nothing() -> None:
    assert (
        score_completions(
            model_of("llama"), [], [], layout="packed", pad_token_id=PAD, autocast_dtype=None
        )
        == []
    )


# ---- which layout --------------------------------------------------------------------------------


def test_a_model_that_agrees_is_packed(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_layout(model_of("llama"), PROMPTS[:2], pad_token_id=PAD, longest=50) == "packed"
    assert not caplog.records


def test_a_comparison_of_layouts_makes_these_passes_and_no_others() -> None:
    model, passes = model_of("llama"), list[int]()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert choose_layout(model, PROMPTS[:2], pad_token_id=PAD, longest=50) == "packed"
    # Three rows alone, twice since they must be the same; their beginnings; the three in a batch;
    # packed and padded rows.
    assert len(passes) == 3 + 3 + 3 + 1 + 1 + 1


@pytest.mark.parametrize("longest", [20, 200])
def test_a_window_that_only_the_mask_knows_is_found_where_it_matters(longest: int) -> None:
    """Qwen2-MoE does not tell its attention function of its window.

    Packed, texts that are shorter than the window come out right.
    """
    config = Qwen2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=64,
        layer_types=["sliding_attention"] * 2,
        initializer_range=0.2,
    )
    model = random_model(config)
    assert choose_layout(model, PROMPTS[:2], pad_token_id=PAD, longest=longest) == (
        "packed" if longest < 64 else "padded"
    )


def test_a_model_that_fails_on_packed_rows_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama")
    forward = type(model).forward

    class NoExtras(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, shared_prefix: object = None, **kwargs: object) -> object:
            if shared_prefix is not None:
                raise TypeError("forward() got an unexpected keyword argument 'shared_prefix'")
            return forward(self, *args, **kwargs)

    model.__class__ = NoExtras
    assert choose_layout(model, PROMPTS[:2], pad_token_id=PAD, longest=50) == "padded"
    assert "unexpected keyword argument" in caplog.text


def test_a_model_that_disagrees_is_padded_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of("llama")
    # A family that scales its logits in a way of its own, which the packed layout cannot know.
    forward = type(model).forward

    class Scaled(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            out = forward(self, *args, **kwargs)
            out.logits = out.logits * 0.5
            return out

    model.__class__ = Scaled
    assert choose_layout(model, PROMPTS[:2], pad_token_id=PAD, longest=50) == "padded"
    (record,) = caplog.records
    assert "differ by" in record.message
    assert "padded rows" in record.message


# ---- drift ---------------------------------------------------------------------------------------

LAYOUTS: tuple[Layout, ...] = ("packed", "padded")


@contextlib.contextmanager
def opened(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    yield model


def drift(
    model: torch.nn.Module,
    start: torch.nn.Module,
    layout: Layout = "packed",
    max_tokens: int | None = None,
) -> Divergence:
    return exact_divergence(
        *(model, lambda: opened(start), PROMPTS, COMPLETIONS),
        layout=layout,
        pad_token_id=PAD,
        autocast_dtype=None,
        max_tokens=max_tokens,
    )


def by_hand(model: torch.nn.Module, start: torch.nn.Module) -> tuple[list[float], list[float]]:
    """KL and entropy of each completion, summed over tokens and vocabulary in float64."""
    kls, entropies = [], []
    with torch.no_grad():
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True):
            policy, ref = one_row(model, p, c).double(), one_row(start, p, c).double()
            gaps, surprises = [], []
            for t in range(len(c)):
                probabilities = policy[t].exp().tolist()
                gaps += [
                    q * (a - b)
                    for q, a, b in zip(
                        probabilities, policy[t].tolist(), ref[t].tolist(), strict=True
                    )
                ]
                surprises += [
                    -q * a for q, a in zip(probabilities, policy[t].tolist(), strict=True)
                ]
            kls.append(math.fsum(gaps))
            entropies.append(math.fsum(surprises))
    return kls, entropies


def moved(start: PreTrainedModel) -> PreTrainedModel:
    """A copy some way off."""
    model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def assert_is(found: Divergence, model: torch.nn.Module, start: torch.nn.Module) -> None:
    kls, entropies = by_hand(model, start)
    assert found.kl == pytest.approx(kls, abs=1e-5)
    assert found.entropy == pytest.approx(entropies, abs=1e-5)
    assert found.tokens == tuple(map(len, COMPLETIONS))
    assert found.kl_per_token == pytest.approx(sum(kls) / 12, abs=1e-5)
    assert found.entropy_per_token == pytest.approx(sum(entropies) / 12, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 25, None])
def test_drift_is_the_full_kl_and_entropy_of_each_completion(
    family: Family, layout: Layout, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "chunk_rows", lambda *_: 5)  # chunks end inside completions
    start = model_of(family)
    model = moved(start)
    found = drift(model, start, layout, max_tokens)
    assert found.kl_per_token > 0.01
    assert_is(found, model, start)
    # The direction: from the policy to the start, not back.
    assert abs(sum(by_hand(start, model)[0]) - sum(found.kl)) > 1e-4
    assert_is(drift(start, model, layout, max_tokens), start, model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drift_of_a_family_that_caps_its_logits(layout: Layout) -> None:
    """Gemma2: packed rows take the head apart, so what comes after it must be put back.

    Uncapped logits drift further.
    """
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    start = random_model(
        Gemma2Config(
            vocab_size=VOCAB,
            **shape,
            head_dim=8,
            final_logit_softcapping=2.0,
            initializer_range=0.2,
        )
    ).eval()
    model = moved(start)
    found = drift(model, start, layout)
    assert_is(found, model, start)
    for m in (model, start):
        m.config.final_logit_softcapping = None
    assert abs(drift(model, start, layout).kl_per_token - found.kl_per_token) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completions_of_one_prompt_keep_their_own_drift(layout: Layout) -> None:
    """In packed rows they share a prompt and are batched out of order.

    Each number must come back to its own completion.
    """
    start = model_of("llama")
    model = moved(start)
    prompts = [PROMPTS[0], PROMPTS[3], PROMPTS[0], PROMPTS[0]]
    options: dict[str, Any] = {"layout": layout, "pad_token_id": PAD, "autocast_dtype": None}
    together = exact_divergence(model, lambda: opened(start), prompts, COMPLETIONS, **options)
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        alone = exact_divergence(model, lambda: opened(start), [prompt], [completion], **options)
        assert together.kl[i] == pytest.approx(alone.kl[0], abs=1e-5)
        assert together.entropy[i] == pytest.approx(alone.entropy[0], abs=1e-5)
    assert len({round(v, 4) for v in together.kl}) == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drift_in_blocks_of_a_token_is_that_of_whole_chunks(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = model_of("llama")
    model = moved(start)
    whole = drift(model, start, layout)
    monkeypatch.setattr(chunked_head, "CPU_BLOCK_LOGITS", 1)
    assert drift(model, start, layout) == whole


def test_the_head_computes_one_position_and_is_not_copied_for_it() -> None:
    """Of a slice that is not taken for a whole tensor torch makes a batch: a bmm with the weight
    expanded, and copied, for it.
    """
    model = model_of("llama").requires_grad_(False)
    products: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.name() in ("aten::mm", "aten::bmm") and args[1].shape[-1] == VOCAB:
                products.append(f"{func.name()} {args[0].shape[-2]}")
            return func(*args, **(kwargs or {}))

    rows = pack_rows(PROMPTS[:1], [COMPLETIONS[:1]])
    with inference(model, None), Seen():
        head_inputs(model, rows)
    assert products == ["aten::mm 1"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_policy_has_not_drifted_from_itself(layout: Layout) -> None:
    model = model_of("llama").train()
    found = drift(model, model, layout)
    assert found.kl_per_token == 0
    assert found.entropy_per_token > 0.1
    assert model.training


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_drift_of_an_adapter_from_the_model_below_it(
    layout: Layout, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_of("llama")
    start = copy.deepcopy(base)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.eval()

    @contextlib.contextmanager
    def adapter_off() -> Iterator[torch.nn.Module]:
        with model.disable_adapter():
            yield model

    def measured() -> Divergence:
        return exact_divergence(
            model,
            adapter_off,
            PROMPTS,
            COMPLETIONS,
            layout=layout,
            pad_token_id=PAD,
            autocast_dtype=None,
            max_tokens=30,
        )

    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: passes.append(1))
    untrained = measured()
    assert untrained.kl_per_token == 0  # an untrained adapter adds nothing
    once = len(passes)
    with monkeypatch.context() as patched:
        patched.setattr(kl, "adapter_is_zero", lambda _: False)
        assert measured() == untrained  # to the bit what two passes give
    assert len(passes) == 3 * once
    hook.remove()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.5 * torch.randn(p.shape, generator=generator)
    found = measured()
    assert found.kl_per_token > 0.01
    assert_is(found, model, start)
    assert model.get_model_status().enabled is True
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ({}, True),
        ({"init_lora_weights": False}, False),
        ({"use_dora": True}, False),  # the norm of a weight, divided by itself
        ({"bias": "lora_only"}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"trainable_token_indices": [3]}, False),
    ],
)
def test_which_adapters_are_seen_to_add_nothing(options: dict[str, Any], zero: bool) -> None:
    def adapted(**more: Any) -> Any:
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
        return get_peft_model(model_of("qwen2"), config)

    model = adapted(**options)
    assert adapter_is_zero(model) == zero
    model.requires_grad_(False)  # nothing is trained, and so a bias is the base's
    assert adapter_is_zero(model) == (zero or "bias" in options)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data[-1, -1] = 1e-30  # of the last layer, too: one number is enough
    assert not adapter_is_zero(model)
    assert not adapter_is_zero(model.get_base_model())


def test_drift_holds_few_tokens_at_once_where_their_logits_are_held() -> None:
    model = model_of("llama")
    prompts, completions = [[5] * 100] * 30, [[7] * 4] * 30
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0].numel())
    )
    exact_divergence(
        model,
        lambda: opened(model),
        prompts,
        completions,
        layout="padded",
        pad_token_id=PAD,
        autocast_dtype=None,
    )
    assert max(fed) <= kl.PADDED_TOKENS
    fed.clear()
    exact_divergence(
        model,
        lambda: opened(model),
        prompts,
        completions,
        layout="packed",
        pad_token_id=PAD,
        autocast_dtype=None,
    )
    assert fed == [100 + 30 * 3] * 2  # one copy of the prompt, once for each policy


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tokens_no_drift(layout: Layout) -> None:
    model = model_of("llama")
    found = exact_divergence(
        model, lambda: opened(model), [], [], layout=layout, pad_token_id=PAD, autocast_dtype=None
    )
    assert found == Divergence((), (), ())
    assert (found.kl_per_token, found.entropy_per_token) == (0.0, 0.0)
