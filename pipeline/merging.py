"""Merged weights of an unmerged model, one tensor at a time: LoRA added in float32, quantized weights dequantized.

A quantized base is merged as the model computes with it, W = dequantize(W_q) + scaling * B A: that is the weight that
the adapter was trained on. Merging into quantized weights, as peft's merge does, would round a second time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import family_of_config

_FULL_PRECISION_MODULES = ("feature_map_q", "feature_map_k")


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the export before it exists: `compute()` makes it, on the CPU, contiguous, in `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, MergedTensor]:
    """Name to tensor of everything that an exported `model` holds, in the order of its modules.

    Names are those of the model without LoRA. Weights get `dtype`; feature maps stay float32. A weight that two
    modules share (tied embeddings) appears once, unless an adapter on one of them makes the two differ.
    """
    from peft.tuners.lora import LoraLayer

    modules = dict(model.named_modules())
    tensors: dict[str, MergedTensor] = {}
    written: set[int] = set()
    for path, module in modules.items():
        if isinstance(module, LoraLayer) or any(part.startswith("lora_") for part in path.split(".")):
            continue
        name = path.removesuffix(".base_layer")
        lora = modules[name] if name != path else None
        assert lora is None or isinstance(lora, LoraLayer)
        wanted_dtype = torch.float32 if any(part in _FULL_PRECISION_MODULES for part in path.split(".")) else dtype
        for key, tensor in _own_tensors(module).items():
            adapted = lora is not None and key == "weight"
            if id(tensor) in written and not adapted:
                continue
            if not adapted:
                written.add(id(tensor))
            is_turned = _is_quantized(tensor) and family_of_config(model.config).linears_are_transposed
            shape = _full_shape(tensor)
            tensors[f"{name}.{key}"] = MergedTensor(
                shape=shape[::-1] if is_turned else shape,
                dtype=wanted_dtype if tensor.is_floating_point() or _is_quantized(tensor) else tensor.dtype,
                compute=_merge(module, key, lora if adapted else None, wanted_dtype, is_turned),
            )
    return tensors


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of this module, not of its children."""
    own: dict[str, Tensor | None] = dict(module._parameters)
    own |= {name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _is_quantized(tensor: Tensor) -> bool:
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def _full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape after dequantization: four-bit weights are stored packed."""
    state: Any = getattr(tensor, "quant_state", None)
    return tuple(tensor.shape if state is None else state.shape)


def _merge(module: nn.Module, key: str, lora: Any, dtype: torch.dtype, is_turned: bool) -> Callable[[], Tensor]:
    """`is_turned`: quantization has made a linear layer, (out, in), of what the family stores as (in, out)."""

    @torch.no_grad()
    def compute() -> Tensor:
        tensor = getattr(module, key)
        if _is_quantized(tensor):
            from peft.utils.integrations import dequantize_module_weight

            tensor = dequantize_module_weight(module)
        if lora is not None:
            tensor = tensor.float()
            for adapter in lora.active_adapters:
                tensor = tensor + lora.get_delta_weight(adapter).float()
        if is_turned:
            tensor = tensor.T
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor.detach().cpu().contiguous()

    return compute
