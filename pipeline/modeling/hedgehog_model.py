"""What every converted model has in common, decoder or encoder. This file travels with every export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ...kernels.feature_maps import FeatureMap
from .hedgehog_attention import FEATURE_MAP_NAMES

# The class below stands before a family's PreTrainedModel, and takes its methods for its own.
_Model = PreTrainedModel if TYPE_CHECKING else nn.Module


class HedgehogPreTrainedModel(_Model):
    """What all converted models say of themselves to transformers."""

    config: Any
    # transformers' own output capturing would need attention weights, which linear attention never has
    _can_record_outputs: ClassVar[dict] = {}
    # from_pretrained(dtype=bfloat16) keeps these fp32
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = list(FEATURE_MAP_NAMES)  # type: ignore[misc]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeatureMap):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def attentions(self) -> Iterator[nn.Module]:
        """The attention modules, in the order of the layers."""
        stack: Any = self.base_model
        return stack.attentions()

    def report_to(self, report: Callable[[str], None]) -> None:
        """Who is told, once, which implementation of linear attention runs, and why."""
        stack: Any = self.base_model
        stack.report = report


def as_a_dataclass(return_dict: bool | None, config: Any) -> bool:
    """Whether a forward pass that was asked so returns its outputs by name."""
    return bool(config.return_dict if return_dict is None else return_dict)


__all__ = ["HedgehogPreTrainedModel", "as_a_dataclass"]
