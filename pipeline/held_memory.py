"""What the tensors of this process are that hold memory: looked up when memory has ended, so nothing keeps account."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn


def held_bytes(device: torch.device) -> dict[str, int]:
    """Bytes on `device` of `weights` (frozen, and buffers) and `training` (weights that learn, gradients, optimizer).

    Every storage counts once. What autograd keeps is not to be found this way: it is what remains of the peak.
    """
    training: dict[int, int] = {}
    weights: dict[int, int] = {}
    objects = [thing for thing in gc.get_objects() if issubclass(type(thing), (nn.Module, torch.optim.Optimizer))]
    for thing in objects:
        if isinstance(thing, torch.optim.Optimizer):
            for tensor in _optimizer_tensors(thing):
                _count(tensor, device, training)
            continue
        for tensor in (*thing.__dict__["_parameters"].values(), *thing.__dict__["_buffers"].values()):
            if tensor is not None:
                kind = training if tensor.requires_grad else weights
                for part in (tensor, tensor.grad, getattr(tensor, "ds_tensor", None)):  # ZeRO-3's own part of a weight
                    _count(part, device, kind)
    for storage in training:
        weights.pop(storage, None)
    return {"weights": sum(weights.values()), "training": sum(training.values())}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _count(tensor: torch.Tensor | None, device: torch.device, found: dict[int, int]) -> None:
    if isinstance(tensor, torch.Tensor) and tensor.device.type == device.type and tensor.layout == torch.strided:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
