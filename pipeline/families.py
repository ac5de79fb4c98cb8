"""The families of models that can be converted, by transformers' name for them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .bert.shape import BertShape
from .errors import ModelError
from .gpt2.shape import GPT2Shape
from .llama.shape import LlamaShape
from .model_shape import ModelShape

if TYPE_CHECKING:
    from .config import LoraConfig

FAMILIES: dict[str, type[ModelShape]] = {family.model_type: family for family in (LlamaShape, GPT2Shape, BertShape)}

HUB_SHAPES: dict[str, ModelShape] = {
    name: shape for family in FAMILIES.values() for name, shape in family.hub_shapes().items()
}
"""Shapes known without asking the hub."""


def family_of(name: str, model_type: object) -> type[ModelShape]:
    """The family of a model; `name` is what a message calls it.

    Raises:
        ModelError: none of them.
    """
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    *first, last = (family.title for family in FAMILIES.values())
    known = f"{', '.join(first)} and {last}"
    plain = model_type.removeprefix("hedgehog_") if isinstance(model_type, str) else None
    if plain != model_type and plain in FAMILIES:
        family = FAMILIES[plain]
        raise ModelError(
            f"{name}: is already a {family.hedgehog_title}; a run starts from the {family.title} that it was made from"
        )
    raise ModelError(f"{name}: has model_type {model_type!r}; only {known} models can be converted")


def shape_from_fields(fields: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        ModelError: another kind of model, a size is missing, or two of them exclude each other.
    """
    return family_of("config.json", fields.get("model_type")).from_fields(fields)


def family_of_config(config: Any) -> type[ModelShape]:
    """The family of a transformers configuration, of a base model or a converted one.

    Raises:
        ModelError: none of them.
    """
    return family_of("the model", config.model_type.removeprefix("hedgehog_"))


def table_length(config: Any) -> int | None:
    """How many positions a model has, where they are a table; None where any position can be had.

    Args:
        config: a transformers configuration, of a base model or a converted one.
    """
    family = family_of_config(config)
    return config.max_position_embeddings if family.positions_are_a_table else None


def lora_modules(config: LoraConfig, family: type[ModelShape]) -> tuple[str, ...]:
    """Names of the modules that get an adapter: the config's, or the attention's projections."""
    return family.attention_modules if config.target_modules is None else config.target_modules


__all__ = [
    "FAMILIES",
    "HUB_SHAPES",
    "family_of",
    "family_of_config",
    "lora_modules",
    "shape_from_fields",
    "table_length",
]
