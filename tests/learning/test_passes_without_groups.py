"""What a process adds that has fewer micro-batches than another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from small_trainer import trainer


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_a_pass_without_groups_gives_every_weight_a_gradient_of_zero(
    tmp_path: Path, sharing: str
) -> None:
    """All of them: processes exchange the gradients of the same weights, in the same order."""
    t = trainer(tmp_path, prefix_sharing=sharing)
    engine = t.parts.engine
    assert engine.layout == ("packed" if sharing == "auto" else "padded")
    before = engine.metrics.sums
    loss = engine.loss(t.policy, None, None, autocast_dtype=None)
    loss.backward()
    assert loss == 0
    for name, weight in t.policy.named_parameters():
        assert weight.grad is not None, name
        assert torch.equal(weight.grad, torch.zeros_like(weight)), name
    assert engine.metrics.sums == before  # it is in no number that is logged
