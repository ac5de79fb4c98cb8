"""A base model's folder on this machine: can it be converted, and do its config and its weights belong together?

Reads config.json and the headers of the safetensors files, never a weight; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .config import LABELLED_KINDS
from .errors import ModelError
from .families import FAMILIES, HUB_SHAPES, family_of

if TYPE_CHECKING:
    from .config import DataConfig, RunConfig
    from .model_shape import ModelShape

_SHOWN = 3
"""Tensors that a message names."""


def read_base_config(folder: Path) -> dict[str, Any]:
    """The fields of a base model's config.json.

    Raises:
        ModelError: no such file, no JSON, or a kind of model that cannot be converted.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; a base model is a folder with config.json and model*.safetensors")
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: has no config.json; a base model is a folder with config.json and model*.safetensors"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({_one_line(error)})") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    family_of(str(folder), model_type)
    return fields


def known_shape(config: RunConfig) -> ModelShape | None:
    """The base model's shape, or None where only the hub knows it. Reads config.json at most; never the network.

    Raises:
        ModelError: a local folder that holds no config.json of a model that can be converted, or a path that does not
            exist.
    """
    if config.tiny is not None:
        return FAMILIES[config.tiny.architecture].of_tiny(config.tiny)
    assert config.model.base is not None, "load_config requires a base model or the tiny section"
    base = config.model.base
    if Path(base).exists():
        fields = read_base_config(Path(base))
        return family_of(base, fields["model_type"]).from_fields(fields)
    if base in HUB_SHAPES:
        return HUB_SHAPES[base]
    if base.startswith(("/", ".")) or base.count("/") > 1:
        raise ModelError(f"{base}: no such folder.")
    return None


def kind_fault(family: type[ModelShape], kind: str) -> str | None:
    """Why models of a family cannot run on data of this kind (`data.kind`), with the cure; None where they can."""
    encoders = " or ".join(f"a {one.title}" for one in FAMILIES.values() if one.is_encoder)
    decoders = " or ".join(f"a {one.title}" for one in FAMILIES.values() if not one.is_encoder)
    if family.is_encoder and kind not in LABELLED_KINDS:
        return (
            f"{kind}, but the base model is a {family.title}, an encoder: set data.kind to classification or "
            f"regression, or take {decoders}."
        )
    if kind in LABELLED_KINDS and not family.is_encoder:
        return f"{kind} needs {encoders}, and the base model is a {family.title}: take another one of the two."
    return None


def pair_fault(shape: ModelShape, data: DataConfig) -> str | None:
    """Why a model cannot read pairs, with the cure; None where it can, or the rows are single texts."""
    if not data.is_labelled or data.second_text_field is None or shape.num_token_types > 1:
        return None
    return (
        f"{data.second_text_field}, but the base model tells no two texts apart (type_vocab_size is "
        f"{shape.num_token_types}): take another one, or single texts."
    )


def check_not_quantized(name: str, fields: Mapping[str, Any]) -> None:
    """
    Raises:
        ModelError: the weights were saved quantized: by another library, or without what a merge needs.
    """
    settings = fields.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "unknown method") if isinstance(settings, Mapping) else settings
        raise ModelError(
            f"{name}: its weights are quantized already ({method}); take the model they were made from, which "
            "model.quantization quantizes as it is loaded"
        )


def check_convertible(name: str, fields: Mapping[str, Any], config: RunConfig) -> None:
    """What linear attention, where the config's conversions have it, asks of a base beyond its shape.

    Raises:
        ModelError: it drops attention weights, of which linear attention has none.
    """
    from .config_loading import variant_configs

    if any(one.model.attention == "linear" for one in (config, *variant_configs(config).values())):
        check_no_dropout(name, fields)


def check_no_dropout(name: str, fields: Mapping[str, Any]) -> None:
    """
    Raises:
        ModelError: it drops attention weights, of which linear attention has none.
    """
    dropout = family_of(name, fields.get("model_type")).attention_dropout(fields)
    if dropout:
        raise ModelError(
            f"{name}: config.json has attention_dropout {dropout}, but linear attention has no attention weights to "
            "drop: set it to 0 there"
        )


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Hold the headers of the folder's safetensors files to the config's sizes.

    Raises:
        ModelError: no safetensors, a missing or truncated file, a tensor that is missing, of another shape, or of a
            layer that the config does not have.
    """
    found = {shape.tensor_name(name): sizes for name, sizes in read_shapes(folder).items()}
    prefix = f"{shape.decoder_prefix}."
    if not any(name.startswith(prefix) for name in found):  # saved from the model without its output layer
        found = {name if name.startswith("lm_head.") else prefix + name: sizes for name, sizes in found.items()}
    expected = shape.tensor_shapes()
    of_layer = re.compile(rf"^{re.escape(shape.layer_prefix)}(\d+)\.")
    wrong = [
        f"{name} has shape {list(found[name])}, config.json makes it {list(sizes)}"
        for name, sizes in expected.items()
        if name in found and found[name] != sizes
    ]
    wrong += [
        f"{name} is there, config.json has {shape.num_layers} layers"
        for name in found
        if (layer := of_layer.match(name)) and int(layer[1]) >= shape.num_layers
    ]
    if wrong:
        raise ModelError(f"{folder}: config.json and the weights are of different models: {_some(wrong, '; ')}")
    without = without_place((name for name in found if name not in expected), shape)
    if without:
        raise ModelError(no_place(str(folder), without))
    missing = sorted(expected.keys() - found.keys())
    if missing:
        raise ModelError(f"{folder}: the weights lack {_some(missing, ', ')}; the folder is incomplete: fetch it again")


_HARMLESS = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.self.position_ids",
)
"""Ends of names of tensors that older versions of transformers saved and compute anew."""


def without_place(names: Iterable[str], shape: ModelShape) -> list[str]:
    """Those of the tensors that stand in a layer, though a model of this shape has none there.

    Biases, norms of q and k, adapters: such a model is another than the one that config.json makes.
    """
    layers = shape.layer_prefix.removeprefix(f"{shape.decoder_prefix}.")
    inside = re.compile(rf"(^|\.){re.escape(layers)}\d+\.")
    return sorted(name for name in names if inside.search(name) and not name.endswith(_HARMLESS))


def no_place(name: str, tensors: list[str]) -> str:
    """What is said of a base with such tensors."""
    return (
        f"{name}: the weights hold {_some(tensors, ', ')}, which a model of this config.json has no place for: without "
        "them it would be another model. Merge an adapter into the weights first; a model of another family that was "
        "saved as this one cannot be converted"
    )


def check_head(base: str, family: type[ModelShape], label_names: Sequence[str]) -> None:
    """Hold a folder's head, where it is a folder and has one, to the data's classes.

    Raises:
        ModelError: it tells another number of them.
    """
    if not Path(base).is_dir():
        return
    classifier = read_shapes(Path(base)).get("classifier.weight")
    if classifier is not None and classifier[0] != len(label_names):
        raise ModelError(other_classes(base, family, label_names))


def lacks_head(folder: Path, family: type[ModelShape]) -> bool:
    """Whether a folder's weights lack the head of an encoder, or half of it.

    Raises:
        ModelError: no safetensors, or a missing or truncated file.
    """
    found = {family.tensor_name(name) for name in read_shapes(folder)}
    prefix = f"{family.decoder_prefix}."
    names = [f"{module}.weight" for module in family.head_modules]
    return not all(name in found or name.removeprefix(prefix) in found for name in names)


def other_classes(base: str, family: type[ModelShape], label_names: Sequence[str]) -> str:
    """What is said of a base whose head is for another task."""
    shown = ", ".join(label_names[:_SHOWN]) + (" …" if len(label_names) > _SHOWN else "")
    other = f"tells other classes than the {len(label_names)} of the data ({shown})"
    if len(label_names) == 1:
        other = "tells classes, and the rows have scores"
    return (
        f"{base}: its head {other}: give it rows of its own task, or take the {family.title} that it was finetuned from"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or the single one. All of them exist.

    Raises:
        ModelError: there are none, or one is missing.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder}: has only pickled weights ({pickled[0]}), which are never loaded because unpickling runs "
                "code; convert them to safetensors first (load them where you trust them, then save_pretrained)"
            )
        raise ModelError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: is not an index of safetensors ({error!r}); fetch it again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ModelError(f"{folder}: the index names {', '.join(missing)}, which is missing; fetch it again")
    return [folder / shard for shard in shards]


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in the folder's safetensors files.

    Raises:
        ModelError: no safetensors, or a missing or truncated file.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        found |= _read_shapes(file)
    return found


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """A safetensors header says how long the file must be: a truncated one shows without reading the weights."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = _one_line(error)
        raise ModelError(f"{file}: truncated or not a safetensors file ({reason}); fetch it again") from error


def _some(items: list[str], separator: str) -> str:
    rest = len(items) - _SHOWN
    return separator.join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
