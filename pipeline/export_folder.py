"""The files of an exported model: sharded safetensors, configs, tokenizer, modeling files, licence files."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError, ResourceError
from .families import family_of_config
from .formatting import format_bytes, parse_bytes
from .interrupts import stop_if_asked
from .merging import MergedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARGIN_BYTES = 64 << 20
"""Room for everything that is not weights: tokenizer, configs, reports."""

_LICENCE_PREFIXES = ("license", "licence", "notice", "use_policy")


def check_disk_space(folder: Path, tensors: Mapping[str, MergedTensor]) -> int:
    """Bytes of the weights, if the disk of `folder` has room for them.

    Raises:
        ResourceError: it has not.
    """
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _MARGIN_BYTES:
        raise ResourceError(
            f"{folder}: the export takes {format_bytes(num_bytes + _MARGIN_BYTES)}, but the disk has only "
            f"{format_bytes(free)} free: make room, or choose another output_dir. Nothing was written."
        )
    return num_bytes


def write_weights(folder: Path, tensors: Mapping[str, MergedTensor], max_shard_size: str) -> list[str]:
    """Write `model*.safetensors`, and their index where there are several; returns the files' names.

    One shard is in memory at a time. A tensor larger than `max_shard_size` gets a file of its own.

    Raises:
        ValueError: `max_shard_size` is not a size such as 5GB or 500MiB.
        Interrupted: a signal came, between two shards.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sizes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=parse_bytes(max_shard_size))
    for file, names in plan.filename_to_tensors.items():
        stop_if_asked("the unfinished folder was removed, and export begins anew")
        save_file({name: tensors[name].compute() for name in names}, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read; weights are shared on clusters
        os.chmod(folder / file, folder.stat().st_mode & 0o666)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return list(plan.filename_to_tensors)


def write_configs(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    pad_id: int,
    *,
    dtype: torch.dtype,
    tensor_names: Mapping[str, Any],
) -> None:
    """config.json, generation_config.json and the tokenizer; for a converted model also the modeling files.

    A model with softmax attention is written as a plain one of its family. The tokenizer pads on the left with
    `pad_id` (or EOS, see below), ready for batched generation; generation is greedy unless the user asks otherwise.
    An encoder's tokenizer pads on the right and reads names of special tokens as text, as prepare did. Where positions
    are a table, it cuts at its length if asked to cut.
    """
    from transformers import GenerationConfig

    from .modeling.hedgehog_fields import HedgehogFields
    from .modeling.shipping import ship_modeling_files

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and "lm_head.weight" not in tensor_names
    is_encoder = family_of_config(config).is_encoder
    if not is_encoder:
        config.use_cache = True
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.save_pretrained(folder)
    # A plain word must not become a special token, nor stand behind the end of every shorter answer of a batch: where
    # `prepare` found only such a one, EOS pads here, as is usual for GPT-2.
    is_special = pad_id in tokenizer.all_special_ids or getattr(
        tokenizer.added_tokens_decoder.get(pad_id), "special", False
    )
    pads = pad_id if is_special else tokenizer.eos_token_id
    if not is_encoder:
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pads,
            do_sample=False,
            use_cache=True,
        ).save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "right" if is_encoder else "left"
    if is_encoder:  # "[SEP]" inside a text was plain characters in training
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    for key in ("is_local", "local_files_only"):  # how it was loaded here, nothing about the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id != pads:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pads)
    if family_of_config(config).positions_are_a_table:  # else truncation=True would not cut what the model cannot read
        longest = min(tokenizer.model_max_length, config.max_position_embeddings)
        tokenizer.model_max_length = tokenizer.init_kwargs["model_max_length"] = longest
    tokenizer.save_pretrained(folder)
    if isinstance(config, HedgehogFields):
        ship_modeling_files(folder)


def copy_licence_files(folder: Path, base_model: str) -> list[str]:
    """Copy LICENSE, NOTICE and USE_POLICY files that lie beside the base model's weights; returns their names."""
    source = Path(base_model)
    if not source.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base_model, "config.json")
        if not isinstance(cached, str):
            return []
        source = Path(cached).parent
    files = sorted(file for file in source.iterdir() if file.name.lower().startswith(_LICENCE_PREFIXES))
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]


def push_folder(folder: Path, repository: str) -> str:
    """Upload the folder to the hub, creating a private repository where there is none; returns its address.

    Raises:
        ResourceError: the hub refuses or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Hedgehog conversion")
    except HFValidationError as error:
        raise ConfigError(f"export.push_to_hub: '{repository}' is not a repository id ({error})") from None
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, OfflineModeIsEnabled):
            cure = "unset HF_HUB_OFFLINE"
        elif isinstance(error, HfHubHTTPError):
            cure = "log in with `hf auth login`"
        else:
            cure = "see that this machine reaches the hub"
        raise ResourceError(
            f"the hub did not take {repository} ({reason}). {folder} is complete: {cure}, then run export again and it "
            "goes on with the upload"
        ) from error
    return str(url)
