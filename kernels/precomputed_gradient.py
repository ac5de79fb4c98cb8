"""A loss whose gradient is already known: for passes that compute both together and keep nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _PrecomputedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        scaled = ((grad_loss[0] * g).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, *scaled


def attach_gradient(loss: Tensor, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """`loss` (a scalar), tied to `parameters` so that backward() gives them `grads` times the incoming gradient.

    The product is formed in the dtype of `grads` and rounded once, to the parameter's dtype. Without parameters, or
    where gradients are switched off, the plain loss.
    """
    if not parameters or not torch.is_grad_enabled():
        return loss
    return _PrecomputedGradient.apply(loss, list(grads), *parameters)
