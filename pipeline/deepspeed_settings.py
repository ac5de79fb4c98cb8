"""DeepSpeed's configuration, made from the YAML, with an expert's JSON merged over it.

There is no bf16 section, on purpose. DeepSpeed would cast the whole module, feature maps and adapters too, and keep
fp32 copies of them. Here the frozen weights simply are bf16, everything that learns is fp32, and both feature maps
and peft's adapters compute in their own type; DeepSpeed takes the whole to be fp32 and optimizes fp32 parameters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import EngineConfig

_BUCKET_ELEMENTS = 50_000_000
"""Largest communication bucket (200 MB of fp32). DeepSpeed's own 500 M would take 2 GB of a GPU for nothing here."""

_OWNERS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "gradient_clip",
    "optimizer": "finetune.optimizer",
    "scheduler": "lr_schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "gradient_allreduce_op": "global_batch_size",
    "managed_gradient_accumulation": "global_batch_size",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
}
"""Keys of a DeepSpeed JSON that the YAML decides, and the YAML's key."""


def deepspeed_settings(
    engine: EngineConfig,
    *,
    micro_batch_size: int,
    num_accumulation: int,
    gradient_clip: float | None,
    num_trainable: int,
    largest_parameter: int,
    keep_weights_whole: bool = False,
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Args:
        num_trainable: elements that learn; sizes the communication buckets.
        largest_parameter: elements of the largest parameter that learns: a bucket must hold it.
        keep_weights_whole: under ZeRO-3, shard gradients and optimizer states but not the module's weights.

    Raises:
        ConfigError: `engine.deepspeed_config` is unreadable or contradicts the YAML.
    """
    bucket = max(largest_parameter, min(num_trainable, _BUCKET_ELEMENTS), 2)
    bucket += bucket % 2  # NCCL's alignment
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": engine.device != "cpu"}
    if engine.zero_stage == 3 and keep_weights_whole:
        zero["stage3_param_persistence_threshold"] = sys.maxsize
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_accumulation,
        "gradient_clipping": gradient_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    if engine.deepspeed_config is not None:
        _merge_expert(settings, read_expert_settings(Path(engine.deepspeed_config)), engine)
    return settings


def frozen_settings(engine: EngineConfig, *, layer_size: int, keep_size: int) -> dict[str, Any]:
    """The dictionary for a frozen module under ZeRO-3, run forward only: one layer of it is whole at a time.

    Of `engine.deepspeed_config` its zero_optimization is heeded (not the parts about an optimizer, as there is none).

    Args:
        layer_size: elements of one layer; of the next one at most `prefetch_elements` more are gathered ahead.
        keep_size: parameters of at most so many elements stay whole on every process (the norms).

    Raises:
        ConfigError: `engine.deepspeed_config` is unreadable.
    """
    ahead = prefetch_elements(layer_size)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": ahead,
        "stage3_max_live_parameters": layer_size + ahead,
        "stage3_max_reuse_distance": 0,  # in a forward pass nothing is used twice
        "stage3_param_persistence_threshold": keep_size,
    }
    if engine.deepspeed_config is not None:
        asked = read_expert_settings(Path(engine.deepspeed_config)).get("zero_optimization", {})
        _merge(zero, {key: value for key, value in asked.items() if key not in ("stage", "offload_optimizer")})
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}


def prefetch_elements(layer_size: int) -> int:
    """Elements that a frozen module's next submodules may have gathered ahead."""
    return min(_BUCKET_ELEMENTS, layer_size)


def read_expert_settings(file: Path) -> dict[str, Any]:
    """A DeepSpeed JSON without its "auto" entries, which mean "whatever the trainer decides".

    Raises:
        ConfigError: missing file, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed_config: cannot read {file} ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed_config: {file} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"engine.deepspeed_config: {file} must hold a JSON object.")
    return _without_auto(content)


def _without_auto(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value != "auto"
    }


def _merge_expert(settings: dict[str, Any], expert: dict[str, Any], engine: EngineConfig) -> None:
    conflicts = []
    for path, owner in _OWNERS.items():
        asked = _look_up(expert, path)
        made = _look_up(settings, path)
        if path == "zero_optimization.offload_optimizer.device":
            made = made or "none"
        switched_off = isinstance(asked, dict) and asked.get("enabled") is False
        if asked is not None and asked != made and not switched_off:
            conflicts.append(f"  {path}: {json.dumps(asked)}, but the YAML's {owner} decides that")
    if conflicts:
        raise ConfigError(
            f"engine.deepspeed_config: {engine.deepspeed_config} contradicts the YAML:\n"
            + "\n".join(conflicts)
            + '\nRemove these keys from the JSON (or set them to "auto") and change the YAML instead.'
        )
    _merge(settings, expert)


def _look_up(settings: dict[str, Any], path: str) -> Any:
    value: Any = settings
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def _merge(target: dict[str, Any], source: dict[str, Any]) -> None:
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
