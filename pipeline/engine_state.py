"""Weights and optimizer states, between ZeRO's flat shards and whole tensors by name.

AdamW's moments are gathered to whole tensors: they fit any ZeRO stage and world size. The 8-bit optimizer's are
not: its blocks follow the flat shards, so every rank keeps its own and gets it back only in the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .deepspeed_import import import_deepspeed
from .errors import CheckpointError

if TYPE_CHECKING:
    from .distributed import World

MOMENTS = ("exp_avg", "exp_avg_sq")
Parameters = Mapping[str, torch.nn.Parameter]
Tensors = dict[str, torch.Tensor]


def gather_state(engine: Any, parameters: Parameters, optimizer_name: str, world: World) -> tuple[Tensors, Tensors]:
    """(weights, optimizer states) on the CPU of the rank that has to write them; empty elsewhere. Collective.

    Args:
        engine: DeepSpeed's engine, at least one step old unless `optimizer_name` is "none".
        optimizer_name: `adamw`, `adamw8bit` or `none` (weights only).
    """
    fragments: dict[int, list[Fragment]] = {}
    for fragment in _fragments(engine):
        fragments.setdefault(id(fragment.parameter), []).append(fragment)
    state = engine.basic_optimizer.state

    def whole(parameter: torch.Tensor, moment: str | None) -> torch.Tensor:
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty parameter behind
        gathered = torch.zeros(shape, device=world.device)
        for part in fragments.get(id(parameter), []):
            source = part.shard if moment is None else state[part.shard][moment]
            gathered.view(-1)[part.in_parameter] = source.detach().view(-1)[part.in_shard].to(world.device)
        if world.world_size > 1 and engine.zero_optimization():
            torch.distributed.all_reduce(gathered)  # every element is zero on all ranks but one
        return gathered.cpu()

    weights: Tensors = {}
    moments: Tensors = {}
    for name, parameter in parameters.items():
        tensor = whole(parameter, None)
        if world.is_main:
            weights[name] = tensor
        for moment in MOMENTS if optimizer_name == "adamw" else ():
            tensor = whole(parameter, moment)
            if world.is_main:
                moments[f"{moment}/{name}"] = tensor
    if optimizer_name == "adamw8bit":
        for index, shard in enumerate(_shards(engine)):
            for key, value in state[shard].items():
                if isinstance(value, torch.Tensor):
                    moments[f"{index}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
    return weights, moments


def restore_weights(parameters: Parameters, folder: Path) -> None:
    """Copy a checkpoint's weights into the module, before DeepSpeed takes it over.

    Raises:
        CheckpointError: other names or shapes.
    """
    weights = _read(folder / "weights.safetensors")
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(
            f"{folder}: it holds other weights than this run trains ({odd[0]} and {len(odd) - 1} more differ). "
            "Begin the stage anew with --force."
        )
    gathered = import_deepspeed().zero.GatheredParameters
    for name, parameter in parameters.items():
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel():
                _check_shape(folder, name, weights[name], parameter.shape)
                parameter.copy_(weights[name])


def restore_optimizer(
    engine: Any,
    parameters: Parameters,
    file: Path,
    step: int,
    layout: Mapping[str, Any],
    saved_layout: Mapping[str, Any],
) -> None:
    """Give a fresh DeepSpeed engine a checkpoint's optimizer state, as after `step` steps.

    Raises:
        CheckpointError: made by another optimizer, or 8-bit states of another layout.
    """
    if saved_layout.get("optimizer") != layout["optimizer"]:
        raise CheckpointError(
            f"{file.parent}: made with optimizer {saved_layout.get('optimizer')}, this run uses {layout['optimizer']}. "
            "Set it back, or begin the stage anew with --force."
        )
    state = engine.basic_optimizer.state
    if layout["optimizer"] == "adamw8bit":
        if dict(saved_layout) != dict(layout):
            raise CheckpointError(
                f"{file.parent}: 8-bit optimizer states fit only the layout that made them, "
                f"ZeRO-{saved_layout['zero_stage']} on {saved_layout['world_size']} processes; this is "
                f"ZeRO-{layout['zero_stage']} on {layout['world_size']}. Resume with that layout, or begin the stage "
                "anew with --force (finetune.optimizer=adamw would fit any)."
            )
        tensors = _read(file)
        for index, shard in enumerate(_shards(engine)):
            entries = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{index}/")}
            state[shard] = {"step": step, **{key: value.to(shard.device) for key, value in entries.items()}}
        return

    whole = _read(file)
    for shard in _shards(engine):
        state[shard] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(shard, requires_grad=False) for moment in MOMENTS},
        }
    names = {id(parameter): name for name, parameter in parameters.items()}
    for part in _fragments(engine):
        for moment in MOMENTS:
            source = whole[f"{moment}/{names[id(part.parameter)]}"].view(-1)
            state[part.shard][moment].view(-1)[part.in_shard] = source[part.in_parameter].to(part.shard.device)


@dataclass(frozen=True)
class Fragment:
    """The piece of a parameter that lies in one of this rank's shards; both are meant flat."""

    parameter: torch.Tensor
    shard: torch.Tensor
    in_shard: slice
    in_parameter: slice


def _shards(engine: Any) -> list[torch.Tensor]:
    """The tensors that this rank's optimizer updates: whole parameters, or ZeRO's flat fp32 shards."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _fragments(engine: Any) -> list[Fragment]:
    """All that this rank updates."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [Fragment(p, p, slice(None), slice(None)) for p in _shards(engine)]
    found = []
    if stage == 3:
        rank = torch.distributed.get_rank()
        for shard, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            for parameter in group:
                _, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = rank * length
                real = min(length, parameter.ds_numel - start)  # the last rank's piece is padded
                if real > 0:
                    found.append(Fragment(parameter, shard, slice(offset, offset + real), slice(start, start + real)))
        return found
    for shard, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                found.append(
                    Fragment(
                        parameter,
                        shard,
                        slice(here.start, here.start + here.numel),
                        slice(there.start, there.start + there.numel),
                    )
                )
    return found


def _read(file: Path) -> Tensors:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: unreadable ({error}). Remove {file.parent} to go on from the checkpoint before it."
        ) from error


def _check_shape(folder: Path, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(tensor.shape)}, this run needs {tuple(shape)}. "
            "Begin the stage anew with --force."
        )
