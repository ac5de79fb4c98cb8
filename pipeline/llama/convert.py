"""From a Llama folder to a Hedgehog-Llama, and feature maps to and from safetensors.

Only safetensors are read. A converted model shares the base model's weights: nothing is copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..errors import ModelError
from ..feature_map_file import MAP_FIELDS, read_feature_maps, write_feature_maps
from .configuration_hedgehog_llama import HedgehogLlamaConfig
from .hedgehog_attention import FEATURE_MAP_NAMES, HedgehogLlamaRotaryEmbedding
from .load_base import check_base, load_base
from .modeling_hedgehog_llama import HedgehogLlamaForCausalLM

__all__ = [
    "check_base",
    "convert_llama",
    "feature_map_metadata",
    "feature_map_modules",
    "load_base",
    "load_feature_maps",
    "load_hedgehog",
    "save_feature_maps",
    "to_plain_llama",
]


def convert_llama(llama: LlamaForCausalLM, **hedgehog_fields: Any) -> HedgehogLlamaForCausalLM:
    """A Hedgehog-Llama around `llama`'s own modules, its feature maps at their initial values (the identity).

    `hedgehog_fields` are fields of HedgehogLlamaConfig (feature_map, feature_dim, attention, …); any other config field
    may be overridden too. `llama` itself goes on working. Quantized linear layers are shared as they are.
    Raises ModelError for a value that the config refuses.
    """
    fields = llama.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "auto_map", "quantization_config"):
        fields.pop(name, None)
    try:
        config = HedgehogLlamaConfig(**{**fields, **hedgehog_fields})
        with no_init_weights(), torch.device("meta"):
            model = HedgehogLlamaForCausalLM(config)
    except ValueError as error:
        raise ModelError(f"cannot convert {llama.config.name_or_path or 'this Llama'}: {error}") from error
    config._name_or_path = llama.config._name_or_path
    config._attn_implementation = llama.config._attn_implementation
    config.architectures = [HedgehogLlamaForCausalLM.__name__]
    config.dtype = llama.config.dtype

    for name in ("embed_tokens", "norm"):
        setattr(model.model, name, getattr(llama.model, name))
    model.model.rotary_emb = HedgehogLlamaRotaryEmbedding(config).to(llama.model.norm.weight.device)
    model.lm_head = llama.lm_head
    layer_pairs = zip(model.model.layers, cast("Iterable[LlamaDecoderLayer]", llama.model.layers), strict=True)
    for hedgehog_layer, llama_layer in layer_pairs:
        for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(hedgehog_layer, name, getattr(llama_layer, name))
        attention = cast(nn.Module, hedgehog_layer.self_attn)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention, name, getattr(llama_layer.self_attn, name))
        if config.attention == "linear":
            device = llama_layer.input_layernorm.weight.device
            for name in FEATURE_MAP_NAMES:
                feature_map = getattr(attention, name).to_empty(device=device)
                feature_map.reset_parameters()

    model.generation_config = llama.generation_config
    # a quantized base stays recognisable as such, to peft and to transformers
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(llama, name):
            setattr(model, name, getattr(llama, name))
    if getattr(llama.config, "quantization_config", None) is not None:
        config.quantization_config = llama.config.quantization_config
    return model.train(llama.training)


def to_plain_llama(model: HedgehogLlamaForCausalLM) -> LlamaForCausalLM:
    """The plain Llama that an attention="softmax" model is, around the same modules: its export needs no custom code.

    Raises ValueError for a model with linear attention.
    """
    if model.config.attention != "softmax":
        raise ValueError("only a model with attention='softmax' is a plain Llama")
    hedgehog_fields = set(model.config.to_dict()) - set(LlamaConfig().to_dict())
    fields = {name: value for name, value in model.config.to_dict().items() if name not in hedgehog_fields}
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    config = LlamaConfig(**fields)
    config._attn_implementation = model.config._attn_implementation
    config.architectures = [LlamaForCausalLM.__name__]
    with no_init_weights(), torch.device("meta"):
        llama = LlamaForCausalLM(config)
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(llama.model, name, getattr(model.model, name))
    llama.lm_head = model.lm_head
    layer_pairs = zip(
        cast("Iterable[LlamaDecoderLayer]", llama.model.layers),
        cast("Iterable[LlamaDecoderLayer]", model.model.layers),
        strict=True,
    )
    for llama_layer, layer in layer_pairs:
        for name in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
            setattr(llama_layer, name, getattr(layer, name))
    llama.generation_config = model.generation_config
    return llama.train(model.training)


def feature_map_modules(model: HedgehogLlamaForCausalLM) -> dict[tuple[int, str], nn.Module]:
    """{(layer, "feature_map_q" | "feature_map_k"): module} of a Hedgehog-Llama, in the order of the layers."""
    return {
        (index, name): getattr(layer.self_attn, name)
        for index, layer in enumerate(cast("Iterable[LlamaDecoderLayer]", model.model.layers))
        for name in FEATURE_MAP_NAMES
        if hasattr(layer.self_attn, name)
    }


def feature_map_metadata(config: HedgehogLlamaConfig) -> dict[str, Any]:
    """What a file of feature maps must say about the model it belongs to."""
    return {field: getattr(config, field) for field in MAP_FIELDS}


def save_feature_maps(
    file: str | os.PathLike,
    model: HedgehogLlamaForCausalLM,
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
    file: str | os.PathLike, model: HedgehogLlamaForCausalLM, layers: Iterable[int] | None = None
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
    num_layers = len(model.model.layers)
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
    base: LlamaForCausalLM, feature_maps_file: str | os.PathLike | None = None, **hedgehog_fields: Any
) -> HedgehogLlamaForCausalLM:
    """convert_llama, with the maps of `feature_maps_file` if one is given.

    The file's own kind of map (feature_map, feature_dim, options) is taken unless `hedgehog_fields` says otherwise.
    """
    if feature_maps_file is None:
        return convert_llama(base, **hedgehog_fields)
    _, metadata = read_feature_maps(feature_maps_file)
    from_file = {field: metadata[field] for field in ("feature_map", "feature_dim", "feature_map_options")}
    model = convert_llama(base, **{**from_file, **hedgehog_fields})
    load_feature_maps(feature_maps_file, model)
    return model
