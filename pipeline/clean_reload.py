"""Loads an exported folder as a stranger would: a script for a fresh interpreter, never imported by the project.

    python -I clean_reload.py REQUEST_FOLDER

`-I` keeps PYTHONPATH and the working directory out; a finder in front of all others hides `hedgehog` itself, which an
editable install would offer. REQUEST_FOLDER holds request.json and request.safetensors; answer.json and
answer.safetensors are written beside them. `drift.py` makes the request and reads the answer.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any, cast


class HedgehogIsHidden(importlib.abc.MetaPathFinder):
    """Makes `import hedgehog` fail, whatever is installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "hedgehog":
            raise ModuleNotFoundError(f"{fullname} is hidden: an export must load without the project")
        return None


def main(folder: Path) -> None:
    sys.meta_path.insert(0, HedgehogIsHidden())

    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "request.safetensors")
    torch.set_num_threads(request["num_threads"])
    device = torch.device(request["device"])

    answer_task, class_name = {
        "generate": (generate, "AutoModelForCausalLM"),
        "classify": (classify, "AutoModelForSequenceClassification"),
    }[request["task"]]
    loaded = getattr(transformers, class_name).from_pretrained(
        request["model"],
        dtype="auto",
        trust_remote_code=request["trust_remote_code"],
        use_safetensors=True,
        output_loading_info=True,
    )
    model, loading = cast(Any, loaded)
    model = model.to(device).eval()
    # it reads config.json first, so it asks for trust too
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        request["model"], trust_remote_code=request["trust_remote_code"]
    )
    with torch.inference_mode():
        answer, facts = answer_task(model, tokenizer, {name: x.to(device) for name, x in tensors.items()}, request)
    save_file({name: x.cpu().contiguous() for name, x in answer.items()}, folder / "answer.safetensors")
    facts |= {
        "model_class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
        "project_modules": sorted(name for name in sys.modules if name.partition(".")[0] == "hedgehog"),
    }
    (folder / "answer.json").write_text(json.dumps(facts), encoding="utf-8")


def classify(model: Any, tokenizer: Any, tensors: dict[str, Any], request: dict[str, Any]) -> tuple[dict, dict]:
    """Logits of the classes; the tokens that the tokenizer gives of each row's texts."""
    logits = model(**tensors).logits.float()
    # as prepare does it: long rows are cut, and "[SEP]" inside a text is plain characters
    cut = {"truncation": "longest_first", "max_length": request["max_length"], "split_special_tokens": True}
    return {"logits": logits}, {"encoded_rows": [tokenizer(*texts, **cut).input_ids for texts in request["texts"]]}


def generate(model: Any, tokenizer: Any, tensors: dict[str, Any], request: dict[str, Any]) -> tuple[dict, dict]:
    """Logits at the rows' last positions, and what follows the prompts; with and without a cache."""
    import torch

    def masked(mask: torch.Tensor) -> dict[str, torch.Tensor]:
        # positions too: plain models with a table of them count the padding otherwise
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    logits = model(
        input_ids=tensors["input_ids"],
        **masked(tensors["attention_mask"]),
        use_cache=False,
        logits_to_keep=request["logits_to_keep"],
    ).logits
    tokens = model.generate(
        input_ids=tensors["prompt_ids"],
        attention_mask=tensors["prompt_mask"],
        max_new_tokens=request["max_new_tokens"],
        min_new_tokens=request["max_new_tokens"],
    )
    # the same tokens read at once: does decoding, one by one from a cache, do what the model does?
    prompt_mask, num_new = tensors["prompt_mask"], request["max_new_tokens"]
    reread = model(
        input_ids=tokens,
        **masked(torch.cat([prompt_mask, prompt_mask.new_ones(len(tokens), num_new)], dim=1)),
        use_cache=False,
        logits_to_keep=num_new + 1,
    ).logits[:, :-1]
    ends = model.generation_config.eos_token_id  # min_new_tokens puts it off
    if ends is not None:
        reread[..., ends] = -torch.inf
    texts = request["texts"]
    facts = {
        "equal_uncached_share": float((reread.argmax(-1) == tokens[:, -num_new:]).double().mean()),
        "encoded_prompts": [
            tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts
        ],
        "encoded_with_special_tokens": [tokenizer(text, split_special_tokens=True).input_ids for text in texts],
    }
    return {"logits": logits.float(), "tokens": tokens}, facts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
