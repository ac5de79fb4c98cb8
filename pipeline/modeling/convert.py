"""From a base model to its converted one, and feature maps to and from safetensors.

Only safetensors are read. A converted model shares the base model's weights: nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import ModelError
from ..feature_map_file import MAP_FIELDS, read_feature_maps, write_feature_maps
from .architecture import architecture_of, share_modules
from .hedgehog_attention import FEATURE_MAP_NAMES
from .hedgehog_model import HedgehogPreTrainedModel

__all__ = [
    "convert_base",
    "feature_map_metadata",
    "feature_map_modules",
    "load_feature_maps",
    "load_hedgehog",
    "save_feature_maps",
]

_NOT_CARRIED_OVER = ("model_type", "architectures", "transformers_version", "auto_map", "quantization_config")


def convert_base(base: PreTrainedModel, **hedgehog_fields: Any) -> HedgehogPreTrainedModel:
    """The converted model around the own modules of `base`, its feature maps at their initial values (the identity).

    `hedgehog_fields` are those of HedgehogFields (feature_map, feature_dim, attention, …); any other config field
    may be overridden too. `base` itself goes on working. Quantized linear layers are shared as they are.
    Raises ModelError for a value that the config refuses.
    """
    architecture = architecture_of(base)
    fields = {
        name: value
        for name, value in base.config.to_dict().items()
        # what is derived from others may stand in a config.json all the same
        if name not in _NOT_CARRIED_OVER and not isinstance(getattr(architecture.config_class, name, None), property)
    }
    fields |= architecture.config_fields()
    try:
        config: Any = architecture.config_class(**{**fields, **hedgehog_fields})
        with no_init_weights(), torch.device("meta"):
            model = architecture.hedgehog_class(config)
    except ValueError as error:
        raise ModelError(f"cannot convert {base.config.name_or_path or 'this model'}: {error}") from error
    config._name_or_path = base.config._name_or_path
    config._attn_implementation = base.config._attn_implementation
    config.architectures = [architecture.hedgehog_class.__name__]
    config.dtype = base.config.dtype

    share_modules(architecture.decoder(model), architecture.decoder(base), architecture.of_decoder)
    share_modules(model, base, architecture.of_model)
    for layer, base_layer in zip(architecture.layers(model), architecture.layers(base), strict=True):
        share_modules(layer, base_layer, architecture.of_layer)
        attention = architecture.attention(layer)
        share_modules(attention, architecture.attention(base_layer), architecture.of_attention)
        if config.attention == "linear":
            device = next(base_layer.get_submodule(architecture.of_layer[-1]).parameters()).device
            for name in FEATURE_MAP_NAMES:
                feature_map = getattr(attention, name).to_empty(device=device)
                feature_map.reset_parameters()
    architecture.complete(model)

    if architecture.is_causal:  # an encoder generates nothing
        model.generation_config = base.generation_config
    # a quantized base stays recognisable as such, to peft and to transformers
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(base, name):
            setattr(model, name, getattr(base, name))
    if getattr(base.config, "quantization_config", None) is not None:
        config.quantization_config = base.config.quantization_config
    return model.train(base.training)


def feature_map_modules(model: HedgehogPreTrainedModel) -> dict[tuple[int, str], nn.Module]:
    """{(layer, "feature_map_q" | "feature_map_k"): module} of a converted model, in the order of the layers."""
    return {
        (index, name): getattr(attention, name)
        for index, attention in enumerate(model.attentions())
        for name in FEATURE_MAP_NAMES
        if hasattr(attention, name)
    }


def feature_map_metadata(config: Any) -> dict[str, Any]:
    """What a file of feature maps must say about the model it belongs to."""
    return {field: getattr(config, field) for field in MAP_FIELDS}


def save_feature_maps(
    file: str | os.PathLike,
    model: HedgehogPreTrainedModel,
    metadata: Mapping[str, Any] | None = None,
    *,
    layers: Iterable[int] | None = None,
) -> None:
    """Write the model's maps (all layers, or only `layers`), with what its config says of them and `metadata`."""
    wanted = None if layers is None else set(layers)
    maps = {
        f"layers.{index}.{name}.{key}": tensor
        for (index, name), module in feature_map_modules(model).items()
        if wanted is None or index in wanted
        for key, tensor in module.state_dict().items()
    }
    write_feature_maps(file, maps, {**feature_map_metadata(model.config), **(metadata or {})})


def load_feature_maps(
    file: str | os.PathLike, model: HedgehogPreTrainedModel, layers: Iterable[int] | None = None
) -> dict[str, Any]:
    """Copy the maps of `file` into `model` (all layers, or only `layers`) and return the file's metadata.

    ModelError if the maps are of another kind or shape than the model's, or a wanted layer is missing.
    """
    tensors, metadata = read_feature_maps(file)
    for field, expected in feature_map_metadata(model.config).items():
        if metadata.get(field) != expected:
            raise ModelError(
                f"{file}: its maps were made with {field} = {metadata.get(field)!r}, the model has {expected!r}"
            )
    modules = feature_map_modules(model)
    num_layers = model.config.num_hidden_layers
    wanted_layers = set(range(num_layers)) if layers is None else set(layers)
    outside = sorted(wanted_layers - set(range(num_layers)))
    if outside:
        raise ModelError(f"layers {outside} do not exist: the model has layers 0 to {num_layers - 1}")
    states: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for (index, name), module in modules.items():
        if index not in wanted_layers:
            continue
        state = {}
        for key, current in module.state_dict().items():
            full_key = f"layers.{index}.{name}.{key}"
            if full_key not in tensors:
                raise ModelError(f"{file}: lacks {full_key}; distill layer {index} and merge it in")
            if tensors[full_key].shape != current.shape:
                raise ModelError(
                    f"{file}: {full_key} has shape {tuple(tensors[full_key].shape)}, the model needs "
                    f"{tuple(current.shape)}"
                )
            state[key] = tensors[full_key]
        states[index, name] = state
    # every check came first: a refused file leaves the model as it was
    for place, state in states.items():
        modules[place].load_state_dict(state)
    return metadata


def load_hedgehog(
    base: PreTrainedModel, feature_maps_file: str | os.PathLike | None = None, **hedgehog_fields: Any
) -> HedgehogPreTrainedModel:
    """convert_base, with the maps of `feature_maps_file` if one is given.

    The file's own kind of map (feature_map, feature_dim, options) is taken unless `hedgehog_fields` says otherwise.
    """
    if feature_maps_file is None:
        return convert_base(base, **hedgehog_fields)
    _, metadata = read_feature_maps(feature_maps_file)
    from_file = {field: metadata[field] for field in ("feature_map", "feature_dim", "feature_map_options")}
    model = convert_base(base, **{**from_file, **hedgehog_fields})
    load_feature_maps(feature_maps_file, model)
    return model
