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
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "request.safetensors")
    torch.set_num_threads(request["num_threads"])
    device = torch.device(request["device"])

    loaded = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype="auto",
        trust_remote_code=request["trust_remote_code"],
        use_safetensors=True,
        output_loading_info=True,
    )
    model, loading = cast(Any, loaded)
    model = model.to(device).eval()
    # it reads config.json first, so it asks for trust too
    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=request["trust_remote_code"])

    def masked(mask: torch.Tensor) -> dict[str, torch.Tensor]:
        # positions too: plain models with a table of them count the padding otherwise
        mask = mask.to(device)
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}

    with torch.inference_mode():
        logits = model(
            input_ids=tensors["input_ids"].to(device),
            **masked(tensors["attention_mask"]),
            use_cache=False,
            logits_to_keep=request["logits_to_keep"],
        ).logits
        tokens = model.generate(
            input_ids=tensors["prompt_ids"].to(device),
            attention_mask=tensors["prompt_mask"].to(device),
            max_new_tokens=request["max_new_tokens"],
            min_new_tokens=request["max_new_tokens"],
        )
        # the same tokens read at once: does decoding, one by one from a cache, do what the model does?
        prompt_mask, num_new = tensors["prompt_mask"].to(device), request["max_new_tokens"]
        reread = model(
            input_ids=tokens,
            **masked(torch.cat([prompt_mask, prompt_mask.new_ones(len(tokens), num_new)], dim=1)),
            use_cache=False,
            logits_to_keep=num_new + 1,
        ).logits[:, :-1]
        ends = model.generation_config.eos_token_id  # min_new_tokens puts it off
        if ends is not None:
            reread[..., ends] = -torch.inf
        equal_uncached = float((reread.argmax(-1) == tokens[:, -num_new:]).double().mean())
    answer = {"logits": logits.float().cpu().contiguous(), "tokens": tokens.cpu().contiguous()}
    save_file(answer, folder / "answer.safetensors")
    facts = {
        "model_class": type(model).__name__,
        "equal_uncached_share": equal_uncached,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
        "encoded_prompts": [
            tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in request["texts"]
        ],
        "encoded_with_special_tokens": [tokenizer(text).input_ids for text in request["texts"]],
        "project_modules": sorted(name for name in sys.modules if name.partition(".")[0] == "hedgehog"),
    }
    (folder / "answer.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
