"""Weights and optimizer states, between ZeRO's flat shards and whole tensors by name.

AdamW's moments are gathered to whole tensors: they fit any ZeRO stage and world size. The 8-bit optimizer's are
not: its blocks follow the flat shards, so every rank keeps its own, with a note of where each parameter lies in it. In
the same layout it gets them back to the bit; in another one they are dequantized, cut anew and quantized again.
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
MOMENTS_8BIT = ("1", "2")
"""bitsandbytes' names end so: state1, qmap1, absmax1."""
BLOCK = 256
"""Numbers that share a scale in bitsandbytes' 8-bit optimizers."""
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
        moments |= _places(engine, parameters)
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

    Args:
        file: the optimizer's, of this rank where each has one. It need not exist where there were fewer ranks.

    Raises:
        CheckpointError: made by another optimizer, or unreadable.
    """
    if saved_layout.get("optimizer") != layout["optimizer"]:
        raise CheckpointError(
            f"{file.parent}: made with optimizer {saved_layout.get('optimizer')}, this run uses {layout['optimizer']}. "
            "Set it back, or begin the stage anew with --force."
        )
    state = engine.basic_optimizer.state
    if layout["optimizer"] == "adamw8bit":
        if dict(saved_layout) != dict(layout):
            whole = _read_dequantized(file.parent, parameters, saved_layout)
            _restore_quantized(engine, parameters, whole, step)
            return
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


def rank_file(rank: int) -> str:
    """Name of a rank's own optimizer states in a checkpoint."""
    return f"optimizer-{rank:05d}.safetensors"


def _places(engine: Any, parameters: Parameters) -> Tensors:
    """By name `place/<parameter>`: number of the shard, first element there, first in the parameter, number of them."""
    numbers = {id(shard): index for index, shard in enumerate(_shards(engine))}
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {}
    for part in _fragments(engine):
        start, stop, _ = part.in_shard.indices(part.shard.numel())
        place = [numbers[id(part.shard)], start, part.in_parameter.start or 0, stop - start]
        found[f"place/{names[id(part.parameter)]}"] = torch.tensor(place)
    return found


def _read_dequantized(folder: Path, parameters: Parameters, layout: Mapping[str, Any]) -> Tensors:
    """Both moments of every parameter, flat and fp32, from the files of all ranks: `1/<parameter>`, `2/<parameter>`."""
    sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in parameters.items()}
    whole = {f"{moment}/{name}": torch.zeros(size) for name, size in sizes.items() for moment in MOMENTS_8BIT}
    missing = dict(sizes)
    # without ZeRO every rank has all of it
    for rank in range(layout["world_size"] if layout["zero_stage"] else 1):
        tensors = _read(folder / rank_file(rank))
        shards: Tensors = {}
        for name in sizes:
            place = tensors.get(f"place/{name}")
            if place is None:
                continue
            number, here, there, length = place.tolist()
            missing[name] -= length
            for moment in MOMENTS_8BIT:
                key = f"{number}/{moment}"
                if key not in shards:
                    shards[key] = _dequantized(tensors, number, moment)
                whole[f"{moment}/{name}"][there : there + length] = shards[key][here : here + length]
    if missing == sizes:
        raise CheckpointError(
            f"{folder}: its 8-bit optimizer states are of an earlier version and resume only on "
            f"{layout['world_size']} processes with engine.zero_stage={layout['zero_stage']}. Go on with these, or "
            "begin the stage anew with --force."
        )
    if any(missing.values()):
        name = next(name for name, length in missing.items() if length)
        raise CheckpointError(
            f"{folder}: the optimizer states of {name} are not whole. Remove it to go on from another."
        )
    return whole


def _dequantized(tensors: Tensors, shard: int, moment: str) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    state = tensors[f"{shard}/state{moment}"].view(-1)
    if state.dtype != torch.uint8:  # small shards stay fp32
        return state
    code, scales = tensors[f"{shard}/qmap{moment}"], tensors[f"{shard}/absmax{moment}"]
    return dequantize_blockwise(state, absmax=scales, code=code, blocksize=BLOCK)


def _restore_quantized(engine: Any, parameters: Parameters, whole: Tensors, step: int) -> None:
    from bitsandbytes.functional import quantize_blockwise

    optimizer, names = engine.basic_optimizer, {id(parameter): name for name, parameter in parameters.items()}
    fragments = _fragments(engine)
    for shard in _shards(engine):
        # a parameter must be in a group, which ZeRO-3 sees to during a step only; the other groups would do as well
        group = optimizer.param_groups[0]
        params, group["params"] = group["params"], [shard]
        optimizer.init_state(group, shard, 0, 0)
        group["params"] = params
        state = optimizer.state[shard]
        state["step"] = step
        for moment in MOMENTS_8BIT:
            flat = torch.zeros(shard.numel(), device=shard.device)
            for part in fragments:
                if part.shard is shard:
                    source = whole[f"{moment}/{names[id(part.parameter)]}"]
                    flat[part.in_shard] = source[part.in_parameter].to(shard.device)
            if state[f"state{moment}"].dtype == torch.uint8:
                flat, scales = quantize_blockwise(flat, code=state[f"qmap{moment}"], blocksize=BLOCK)
                state[f"absmax{moment}"].copy_(scales.absmax)
            state[f"state{moment}"].view(-1).copy_(flat)


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
