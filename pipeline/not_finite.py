"""Where the first NaN or infinity of a forward and backward pass appeared. For a pass repeated to find that out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class FirstFault:
    """Names of the first module whose output, and of the first weight whose gradient, was not finite; else None.

    Forward passes come from below, gradients from the loss down: the first is where it began.
    """

    def __init__(self) -> None:
        self.output: str | None = None
        self.gradient: str | None = None

    def describe(self) -> str | None:
        """For the user; an output before a gradient, which may come of it."""
        if self.output is not None:
            return f"the output of {self.output}"
        return None if self.gradient is None else f"the gradient of {self.gradient}"


@contextmanager
def watch_for_faults(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> Iterator[FirstFault]:
    """Look at every output of `module`'s submodules and every gradient of `parameters`. Slow: every look waits."""
    fault = FirstFault()

    def of_output(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if fault.output is None and isinstance(first, torch.Tensor) and not _finite(first):
            fault.output = name

    def of_gradient(name: str, gradient: torch.Tensor) -> None:
        if fault.gradient is None and not _finite(gradient):
            heads = gradient.flatten(1).isfinite().all(dim=1) if gradient.dim() == 3 else None  # a feature map's
            head = "" if heads is None else f", head {int((~heads).nonzero()[0])}"
            fault.gradient = name + head

    handles: list[Any] = [
        submodule.register_forward_hook(lambda _, inputs, output, name=name: of_output(name, output))
        for name, submodule in module.named_modules()
        if name
    ]
    handles += [
        parameter.register_hook(lambda gradient, name=name: of_gradient(name, gradient))
        for name, parameter in parameters.items()
    ]
    try:
        yield fault
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
