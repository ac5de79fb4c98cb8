"""A finished conversion as a model: base weights, feature maps and adapter, unmerged, as `finetune` left them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import RunConfig
    from .manifest import StageInput


def load_variant_model(
    config: RunConfig,
    inputs: Mapping[str, StageInput],
    device: torch.device,
    dtype: str | torch.dtype,
    report: Callable[[str], None],
) -> PreTrainedModel:
    """The model of one variant in eval mode: a converted one, or the plain base for softmax attention.

    The maps come from `finetune`, or from `distill` where nothing was finetuned; LoRA layers stay separate modules.

    Args:
        config: the variant's own config (overrides applied).
        inputs: its finished stages `prepare`, `distill` and `finetune`.
        dtype: of the base weights; feature maps and adapter stay float32.
        report: told once which implementation of linear attention runs, and why.

    Raises:
        ModelError, CheckpointError: an artifact is missing, torn, or does not fit the model.
    """
    from .classification_head import load_head, new_head
    from .modeling.convert import load_hedgehog
    from .modeling.load_base import load_prepared_base

    base = load_prepared_base(inputs["prepare"], config, dtype=dtype, device=device)
    if inputs["finetune"].skipped and new_head(base):
        raise ModelError(
            f"{config.model.base}: has no head for these classes, and nothing was finetuned: set finetune.enabled to "
            "true, or take a base that was finetuned on this task"
        )
    model: PreTrainedModel = base
    if config.model.attention == "linear":
        maps_from = inputs["distill"] if inputs["finetune"].skipped else inputs["finetune"]
        model = hedgehog = load_hedgehog(
            base,
            maps_from.artifact("feature_maps"),
            attention_eps=config.model.attention_eps,
            chunk_size=config.model.chunk_size,
            attention_backend=config.model.attention_backend,
            feature_map_seed=config.seed,
        )
        hedgehog.report_to(report)
    if not inputs["finetune"].skipped:
        model = _attach_adapter(model, inputs["finetune"].artifact("adapter"))
        if inputs["finetune"].has("head"):
            load_head(inputs["finetune"].artifact("head"), model)
    return model.eval()


def _attach_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with its target modules wrapped in peft's LoRA layers, in place."""
    from peft import PeftModel
    from safetensors import safe_open

    peft_model = PeftModel.from_pretrained(model, folder, is_trainable=False)
    wanted = {
        name.replace(f".{peft_model.active_adapter}.", ".")
        for name, _ in peft_model.named_parameters()
        if "lora_" in name
    }
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118 (a file handle, not a dict)
    if wanted != found:
        # peft only warns, and would leave the missing adapters at their start
        differing = sorted(wanted ^ found)
        raise CheckpointError(
            f"{folder}: the adapter does not fit the model ({len(differing)} tensors differ, such as {differing[0]}); "
            "run finetune again with --force"
        )
    return peft_model.get_base_model()  # type: ignore[return-value]


def softmax_reference(variants: Mapping[str, RunConfig]) -> str | None:
    """Name of the finetuned variant with softmax attention that the others are measured against, if there is one."""
    for name, config in variants.items():
        if config.model.attention == "softmax" and config.finetune.enabled:
            return name
    return None
