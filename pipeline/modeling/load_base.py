"""Loading the base model that a run starts from: every way in which a user's folder can be wrong has its own message.

Only safetensors are read, never pickle, and no code of the folder is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..base_folder import check_not_quantized, check_weights, no_place, other_classes, read_base_config, without_place
from ..classification_head import draw_head
from ..data.base_fingerprint import check_base_unchanged
from ..errors import ModelError
from ..families import family_of, family_of_config, shape_from_fields
from .architecture import architecture, architecture_of

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..manifest import StageInput

QUANTIZATIONS = ("nf4", "int8")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")


def load_base(
    path_or_id: str | os.PathLike,
    *,
    dtype: str | torch.dtype,
    revision: str | None = None,
    quantization: str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    label_names: Sequence[str] | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """The language model or encoder in a local folder, or of a hub id, in eval mode.

    dtype          of the weights (a torch dtype or its name); with `quantization` of the computation
    quantization   None, "nf4" (4 bit, double quantization) or "int8", through bitsandbytes; works on a CPU
    device         where to put it; None leaves it where transformers puts it (the CPU, or ZeRO-3's shards)
    label_names    the classes that an encoder tells, in their order, or one name: of the score that it gives; where it
                   lacks a head, or half of one, that is drawn from `seed`

    Raises ModelError, with the cure, for: a missing folder, a kind of model that cannot be converted, a missing shard,
    a truncated file, pickled weights only, weights quantized already, tensors that are missing or of another shape than
    the config's, a hub id that cannot be fetched, a quantization that cannot be done, a head for other classes.
    """
    name = str(path_or_id)
    dtype = _torch_dtype(dtype)
    config = check_base(path_or_id, revision=revision)
    architecture = architecture_of(config)
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "attn_implementation": attn_implementation,
        "output_loading_info": True,
    }
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype, architecture.family.head_modules)
    # a base may say that it gives tuples, more than logits, or scores of several labels a row: no run asks for that
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    options["config"] = config
    num_own_labels = getattr(config, "num_labels", None)
    if label_names is not None:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}
        config.problem_type = "regression" if len(label_names) == 1 else "single_label_classification"
    if device is not None and (quantization is not None or torch.device(device).type != "cpu"):
        # file by file to where it belongs: eight ranks of a node would else hold eight copies in its memory
        options["device_map"] = {"": str(device)}
    if revision is not None:
        options["revision"] = revision
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):  # transformers draws what is missing; so do we, below
            loaded: Any = architecture.base_class.from_pretrained(name, **options)
    except OSError as error:
        raise _cannot_fetch(name, error) from error
    except SafetensorError as error:
        raise ModelError(
            f"{name}: a safetensors file is truncated or damaged ({_one_line(error)}); fetch it again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        if label_names is not None and num_own_labels != len(label_names):
            raise ModelError(other_classes(name, family_of_config(config), label_names)) from error
        raise ModelError(f"{name}: config.json and the weights are of different models; fetch it again") from error
    except (KeyError, ValueError) as error:  # an activation that transformers lacks, a dropout above 1, …
        said = f"{type(error).__name__}: {_one_line(error)}"
        title = architecture.family.title
        raise ModelError(f"{name}: transformers cannot load it as a {title} ({said}); see its config.json") from error
    base, info = loaded
    new = _new_modules(base, info["missing_keys"], architecture.family.head_modules)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(tuple(f"{name}." for name in new)))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"{name}: the weights lack {shown}; the folder is incomplete: fetch it again")
    without = without_place(info["unexpected_keys"], shape_from_fields(config.to_dict()))
    if without:
        raise ModelError(no_place(name, without))
    if quantization == "nf4":
        _keep_weights_differentiable(base)
    if new:
        draw_head(base, new, seed)
    architecture.loaded(base)
    return base.eval()


def _new_modules(base: PreTrainedModel, missing: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Those of the modules that the weights lack altogether: one that is there in part is a damaged file."""
    lacking = set(missing)
    return [
        name
        for name in modules
        if lacking >= {f"{name}.{key}" for key, _ in base.get_submodule(name).named_parameters()}
    ]


def load_prepared_base(
    prepare: StageInput, config: RunConfig, *, dtype: str | torch.dtype, device: torch.device | None
) -> PreTrainedModel:
    """The base model that a run prepared, as its stages load it: see load_base, also for the errors.

    Raises:
        CheckpointError: it has changed since.
    """
    check_base_unchanged(prepare, config.model.revision)
    return load_base(
        prepare.summary["base_model"],
        dtype=dtype,
        revision=config.model.revision,
        quantization=config.model.quantization,
        device=device,
        label_names=prepare.summary.get("label_names"),
        seed=config.seed,
    )


def _keep_weights_differentiable(base: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking NF4 weights for inference.

    On a CPU with AVX512-BF16 the first forward without gradients (a validation loss is enough) repacks them in place
    for an operator in bf16. That one has no backward, so that training goes on from there without the gradients of all
    layers below, and says nothing; it takes no input that is narrower than a quantization block; and the weights it
    computes with are other ones than those which are exported.
    """
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_base(path_or_id: str | os.PathLike, *, revision: str | None = None) -> PreTrainedConfig:
    """Everything that can be checked before a weight is read: returns the config or raises ModelError."""
    name = str(path_or_id)
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return _check_folder(folder)
    if folder.exists():
        raise ModelError(f"{name}: is a file; a base model is a folder with config.json and model*.safetensors")
    if not _HUB_ID.match(name) or name.startswith("."):
        raise ModelError(f"{name}: there is no such folder; correct the path to the base model")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_fetch(name, error) from error
    fields = config.to_dict()
    check_not_quantized(name, fields)
    family_of(name, config.model_type).from_fields(fields)
    return config


def _check_folder(folder: Path) -> PreTrainedConfig:
    fields = read_base_config(folder)
    check_not_quantized(str(folder), fields)
    family = family_of(str(folder), fields["model_type"])
    try:
        config = architecture(family.model_type).base_config_class.from_pretrained(folder)
    except Exception as error:  # transformers' validation has its own families of errors
        file = folder / "config.json"
        raise ModelError(f"{file}: not a valid {family.title} configuration ({_one_line(error)})") from error
    check_weights(folder, shape_from_fields(config.to_dict()))
    return config


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of tensors that are missing, of another shape, or not wanted: ours says what it
    means for a run."""
    logging = transformers.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cannot_fetch(name: str, error: BaseException) -> ModelError:
    return ModelError(
        f"{name}: is no local folder, and cannot be fetched from the hub either ({_one_line(error)}); "
        "without a network, put the model's folder on this machine and give its path"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype {dtype!r} is not a floating-point type; known: float32, bfloat16")
    if found == torch.float16:
        raise ModelError("dtype float16 overflows in the feature maps; use bfloat16 or float32")
    return found


def _quantization_config(quantization: str, dtype: torch.dtype, kept_whole: Sequence[str]) -> Any:
    if quantization not in QUANTIZATIONS:
        raise ModelError(f"quantization {quantization!r} is unknown; known: {', '.join(QUANTIZATIONS)}")
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a broken native library raises all sorts
        raise ModelError(
            f"quantization {quantization!r} needs bitsandbytes, which cannot be imported here ({_one_line(error)}); "
            "install it, or leave quantization out"
        ) from error
    from transformers import BitsAndBytesConfig

    # None: transformers finds the output layer itself
    skipped: dict[str, Any] = {"llm_int8_skip_modules": list(kept_whole) or None}
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        **skipped,
    )
