"""LoRA adapters through peft: attached in float32, saved in peft's format, reopened before they count as saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import CheckpointError, ConfigError
from .families import family_of_config, lora_modules
from .run_folder import atomic_directory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from .config import LoraConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def attach_lora(model: PreTrainedModel, config: LoraConfig, *, seed: int) -> PeftModel:
    """Freeze `model` and put adapters on the modules that the config names: float32, B zero, A drawn from `seed`.

    Raises:
        ConfigError: a name that no module of the model has.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    family = family_of_config(model.config)
    targets = lora_modules(config, family)
    names = [name for name, _ in model.named_modules()]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unknown:  # peft only complains where nothing at all matches
        raise ConfigError(f"finetune.lora.target_modules: the model has no module named {', '.join(unknown)}.")
    settings = peft.LoraConfig(
        # an encoder's head is not peft's to train
        task_type=None if family.is_encoder else peft.TaskType.CAUSAL_LM,
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft annotates int, computes with floats
        lora_dropout=config.dropout,
        target_modules=list(targets),
        fan_in_fan_out=any(
            isinstance(module, Conv1D) and any(f".{name}".endswith(f".{target}") for target in targets)
            for name, module in model.named_modules()
        ),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers about a property it renamed
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(f"finetune.lora.target_modules: {error}") from error
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def save_adapter(folder: Path, adapted: PeftModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, then read them again and compare shapes.

    Args:
        weights: whole tensors by the names of `adapted.named_parameters()`; under ZeRO-3 the model's own are empty.

    Raises:
        CheckpointError: what was written does not hold every adapter in its full shape.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    expected = {
        _file_key(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in adapted.named_parameters()
        if "lora_" in name
    }
    tensors = {_file_key(name): tensor.contiguous() for name, tensor in weights.items() if "lora_" in name}
    settings = {key: _plain(value) for key, value in adapted.peft_config["default"].to_dict().items()}
    settings["inference_mode"] = True
    with atomic_directory(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        with safe_open(temporary / WEIGHTS_FILE, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if found != expected:
            odd = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
            raise CheckpointError(
                f"{folder}: the adapter came out wrong: {odd[0]} has shape {found.get(odd[0])}, not "
                f"{expected.get(odd[0])} ({len(odd)} tensors differ)."
            )


def _file_key(name: str) -> str:
    """peft leaves the adapter's own name out of its files."""
    return name.replace(".default.", ".")


def _plain(value: Any) -> Any:
    """JSON, with sets in order: equal adapters are equal files."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if hasattr(value, "value") else value
