"""What identifies a base model and a tokenizer, without hashing 13 GB."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..manifest import StageInput, fingerprint, hash_file
from .sources import file_suffixes

if TYPE_CHECKING:
    from ..config import DataConfig, ModelConfig

_EDGE_BYTES = 1 << 20
_TENSOR_BYTES = 4096
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


def fingerprint_base(path_or_id: str, revision: str | None, config: Any) -> str:
    """SHA-256 over a local folder's config.json, and of each weight file over name, size, both ends and its tensors'
    beginnings.

    Training changes all of a tensor that it changes: these tell two models apart in practice, without reading 13 GB.
    For a hub id, over its config, id, revision and the commit that the hub resolved it to, where known. Another version
    of transformers changes nothing.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        weights = [[file.name, file.stat().st_size, _hash_parts(file)] for file in files]
        identity: dict[str, Any] = {"config": hash_file(folder / "config.json"), "weights": weights}
    else:
        fields = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
        identity = {
            "config": fields,
            "id": path_or_id,
            "revision": revision,
            "commit": getattr(config, "_commit_hash", None),
        }
    return fingerprint(identity)


def fingerprint_local_inputs(model: ModelConfig, data: DataConfig) -> dict[str, str]:
    """Config key and path to SHA-256, for every local file and folder that `model` and `data` name and that exists.

    Data and tokenizer files are hashed whole; of a base folder, `config.json` and what `fingerprint_base` reads of the
    weights. What cannot be read is left out: the stage itself says so, with the cure.
    """
    found: dict[str, str] = {}
    named = {f"data.{key}": getattr(data, key) for key in ("dataset", "train_file", "validation_file", "test_file")}
    for key, value in named.items():
        with contextlib.suppress(OSError):
            path = Path(value).expanduser() if value else None
            if path is not None and path.is_file():
                found[f"{key} {value}"] = hash_file(path)
            elif path is not None and path.is_dir():
                files = sorted(file for file in path.iterdir() if file.suffix in file_suffixes(data))
                found[f"{key} {value}"] = _fingerprint_files(files)
    base = Path(model.base).expanduser() if model.base else None
    tokenizer = Path(model.tokenizer).expanduser() if model.tokenizer else base
    with contextlib.suppress(OSError):
        if base is not None and (base / "config.json").is_file():
            files = sorted(base.glob("*.safetensors"))
            weights = [[file.name, file.stat().st_size, _hash_parts(file)] for file in files]
            found[f"model.base {model.base}"] = fingerprint([hash_file(base / "config.json"), weights])
    with contextlib.suppress(OSError):
        if tokenizer is not None and tokenizer.is_dir():
            files = sorted(file for name in _TOKENIZER_FILES for file in tokenizer.glob(name))
            found[f"model.tokenizer {model.tokenizer or model.base}"] = _fingerprint_files(files)
    return found


def check_base_unchanged(prepare: StageInput, revision: str | None) -> None:
    """Refuse a local base folder whose config or weights changed since `prepare` looked at it.

    Raises:
        CheckpointError: it changed; the message names the folder and the cure.
        ModelError: it is not to be used any more.
    """
    from ..modeling.load_base import check_base

    path, recorded = prepare.summary["base_model"], prepare.summary.get("base_fingerprint")
    if recorded is None or not Path(path).expanduser().is_dir():
        return
    if fingerprint_base(path, revision, check_base(path, revision=revision)) != recorded:
        raise CheckpointError(
            f"{path}: the base model changed since prepare looked at it. Put the earlier files back, or begin with "
            "`hedgehog prepare CONFIG --force`."
        )


def _fingerprint_files(files: list[Path]) -> str:
    return fingerprint([[file.name, hash_file(file)] for file in files])


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over what decides the tokens: the fast tokenizer's own serialization, or the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return fingerprint({"content": content, "special": special})


def _hash_parts(file: Path) -> str:
    """Of a safetensors file: its edges, and the beginnings of its tensors, at the places that its header names."""
    size = file.stat().st_size
    with open(file, "rb") as handle:
        edge = handle.read(_EDGE_BYTES)
        digest = hashlib.sha256(edge)
        handle.seek(max(0, size - _EDGE_BYTES))
        digest.update(handle.read(_EDGE_BYTES))
        header_bytes = int.from_bytes(edge[:8], "little")
        if size <= 2 * _EDGE_BYTES or header_bytes > size:  # hashed whole already; or no such file
            return digest.hexdigest()
        handle.seek(8)
        try:
            header = json.loads(handle.read(header_bytes))
            starts = sorted(entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return digest.hexdigest()  # whoever loads it says what is wrong
        for start in starts:
            handle.seek(8 + header_bytes + start)
            digest.update(handle.read(_TENSOR_BYTES))
    return digest.hexdigest()
