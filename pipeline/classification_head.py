"""An encoder's head: what it takes to tell classes or a score, pooler and classifier.

It learns whole, in float32, in stage two.

A base that was only pretrained has none, or only half of it; then it begins at random, the same for a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import CheckpointError
from .families import family_of_config
from .run_folder import atomic_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEW_HEAD = "hedgehog_new_head"
"""Attribute of a base whose head, or half of it, began at random."""


def head_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Name to module of the head of a base or converted model; empty for a decoder."""
    found: dict[str, Any] = {name: model.get_submodule(name) for name in family_of_config(model.config).head_modules}
    return found


def class_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits (B, C), float32, where the model lies; of a head that gives scores these, (B, 1).

    Args:
        model: a base or converted encoder with a head, float32 or below.
        batch: `input_ids` (B, L), `mask` (B, L; True or 1 at real tokens) and `token_type_ids` (B, L), on any device.
    """
    device = next(model.parameters()).device
    logits_BC = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["mask"].to(device),
        token_type_ids=batch["token_type_ids"].to(device),
    ).logits
    return logits_BC.float()


def draw_head(base: PreTrainedModel, missing: Sequence[str], seed: int) -> None:
    """Put new modules in place of those called so: normal weights of the config's width, zero biases."""
    config: Any = base.config
    random = torch.Generator().manual_seed(seed)
    for name, module in head_modules(base).items():
        # drawn for each: what is new does not depend on what else is
        size = (module.out_features, module.in_features)
        weight = torch.randn(size, generator=random) * config.initializer_range
        if name in missing:
            # no draw of torch's own comes before
            linear: Any = nn.utils.skip_init(nn.Linear, *size[::-1], device=module.weight.device)
            with torch.no_grad():
                linear.weight.copy_(weight)
                linear.bias.zero_()
            parent, _, own = name.rpartition(".")
            setattr(base.get_submodule(parent), own, linear.to(base.dtype))
    setattr(base, NEW_HEAD, tuple(missing))


def new_head(base: PreTrainedModel) -> tuple[str, ...]:
    """Modules of a base model's head that began at random."""
    return getattr(base, NEW_HEAD, ())


def release_head(model: PreTrainedModel) -> list[nn.Parameter]:
    """Make the head learn, in float32: its weights. What comes in is widened, and so are the logits."""
    parameters = []
    for module in head_modules(model).values():
        _widen(module)
        parameters += [parameter.requires_grad_() for parameter in module.parameters()]
    return parameters


def save_head(file: Path, model: PreTrainedModel, weights: Mapping[int, torch.Tensor]) -> None:
    """Write the head's tensors, by the model's names for them.

    Args:
        weights: whole tensors by the id of the model's parameter; under ZeRO-3 its own are empty.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": weights[id(parameter)].contiguous()
        for name, module in head_modules(model).items()
        for key, parameter in module.named_parameters()
    }
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def load_head(file: Path, model: PreTrainedModel) -> None:
    """Put what `save_head` wrote into the model, in float32.

    Raises:
        CheckpointError: it is of another model.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    modules = head_modules(model)
    expected = {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in expected.items()}:
        raise CheckpointError(f"{file}: this head does not fit the model; run finetune again with --force")
    for module in modules.values():
        _widen(module)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])


def _widen(module: nn.Linear) -> None:
    """Compute in float32, whatever precision the input has."""
    module.float()

    def widen(linear: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(module.weight.dtype) for x in inputs)

    module.register_forward_pre_hook(widen)
