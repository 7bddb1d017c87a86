"""How far two computations of the same log-probabilities may be apart by rounding alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from neat_align.modeling.shared_prefix import unwrapped


@dataclass(frozen=True)
class Limit:
    """How far two computations of the same log-probabilities may be apart, in nats per token.

    fp32: at the worst token. Otherwise on average: half precision and quantised weights round
    differently in every shape, and another attention is off by far more than that.
    """

    nats: float
    exact: bool

    def measure(self, difference: Float[Tensor, "..."]) -> float:
        """The difference that is held against `nats`; not a number where the weights are broken."""
        return float(difference.abs().max() if self.exact else difference.abs().mean())

    def is_passed_by(self, difference: float) -> bool:
        """Whether this is more than rounding; broken weights, whose numbers are none, never do."""
        return difference > self.nats


EXACT = Limit(1e-3, True)
HALF_PRECISION = Limit(0.05, False)


def rounding_limit(model: torch.nn.Module) -> Limit:
    """What rounding explains, from the number types of the model's weights."""
    inner = unwrapped(model)
    quantised = (
        isinstance(inner, PreTrainedModel)
        and getattr(inner.config, "quantization_config", None) is not None
    )
    if own_type(model) is not None:
        return HALF_PRECISION
    types = {(p.dtype, p.device) for p in model.parameters() if p.is_floating_point()}
    exact = not quantised and all(
        dtype == torch.float32 and _multiplies_exactly(device) for dtype, device in types
    )
    return EXACT if exact else HALF_PRECISION


def own_type(model: torch.nn.Module) -> torch.dtype | None:
    """What a model computes in where no type is asked for; None: in its weights' own.

    FlashAttention's kernels know no fp32: fp32 weights that use them compute in bf16 autocast.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return None
    is_flash = str(inner.config._attn_implementation).startswith("flash_attention")
    in_fp32 = any(p.dtype == torch.float32 and p.ndim > 1 for p in inner.parameters())
    return torch.bfloat16 if is_flash and in_fp32 else None


def _multiplies_exactly(device: torch.device) -> bool:
    """Whether fp32 products keep fp32's bits: a GPU may be told to drop half of them (TF32)."""
    if device.type in ("cpu", "meta"):
        return True
    values = torch.full((64, 64), 1 + 2**-12, device=device)
    return bool(torch.equal(values @ torch.eye(64, device=device), values))
