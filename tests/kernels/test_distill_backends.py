"""A kernel that fails or is wrong on a device does not serve there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hedgehog.kernels.distill_backends import disagreement
from hedgehog.kernels.distill_loss import DistillLoss, attention_distillation_loss
from hedgehog.kernels.feature_maps import make_feature_map
from hedgehog.kernels.precomputed_gradient import attach_gradient

CPU = torch.device("cpu")


def maps() -> tuple[Any, Any]:
    return tuple(
        make_feature_map("hedgehog_softmax", num_heads=2, head_dim=16, feature_dim=16, side=side)
        for side in ("query", "key")
    )  # type: ignore[return-value]


def verdict(kernel: Any) -> str | None:
    return disagreement(kernel, *maps(), CPU, torch.float32)


def test_a_right_kernel_serves_and_is_asked_once():
    calls = []

    def kernel(*arguments: Any, **options: Any) -> DistillLoss:
        calls.append(arguments)
        return attention_distillation_loss(*arguments, **options)

    state = torch.random.get_rng_state()
    assert verdict(kernel) is None and verdict(kernel) is None
    assert len(calls) == 2, "with its own log-sum-exp, and with one that is given"
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
@pytest.mark.parametrize("what", ["kl_H", "gradient"])
def test_a_wrong_kernel_does_not_serve(what: str, factor: float):
    def kernel(*arguments: Any, **options: Any) -> DistillLoss:
        right = attention_distillation_loss(*arguments, **options)
        if what == "kl_H":
            return replace(right, kl_H=right.kl_H + factor)
        weights = [m.projection_HDP for m in arguments[2:4]]
        grads = [grad * factor for grad in torch.autograd.grad(right.loss, weights)]
        return replace(right, loss=attach_gradient(right.loss.detach(), weights, grads))

    found = verdict(kernel)
    assert found is not None and "differs from PyTorch here by" in found


def test_a_kernel_that_takes_a_given_log_sum_exp_for_bits_does_not_serve():
    def kernel(*arguments: Any, log_sum_exp_BHL: torch.Tensor | None = None, **options: Any) -> DistillLoss:
        right = attention_distillation_loss(*arguments, **options)
        if log_sum_exp_BHL is None:
            return right
        q, k = (x.double() for x in arguments[:2])
        logits = (q @ k.mT / 4).masked_fill(torch.ones(130, 130, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(log_sum_exp_BHL.double(), logits.logsumexp(dim=-1))
        return replace(right, kl_H=right.kl_H * 1.4427)

    found = verdict(kernel)
    assert found is not None and "differs from PyTorch here by" in found


def test_a_kernel_that_fails_does_not_serve():
    def kernel(*arguments: Any, **options: Any) -> DistillLoss:
        raise RuntimeError("no C compiler\nand more")

    assert verdict(kernel) == "the kernel fails here (no C compiler)"
