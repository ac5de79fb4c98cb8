"""How far an exported model is from the unmerged one: logits and greedy tokens on a few test rows.

The exported side runs in a fresh interpreter without this project (clean_reload.py), so that the comparison is also
the proof that plain transformers loads the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.tokens import TokenizedSplit
from .errors import ModelError
from .generation import left_pad, room_for_answers
from .interrupts import stop_if_asked, stopped_child

PROBE_ROWS = 4
PROBE_POSITIONS = 64
"""Last positions of prompt + reference summary whose logits are compared."""
PROBE_NEW_TOKENS = 32
"""Tokens generated greedily after each prompt."""

_TEXT_PROMPT = 32
"""Tokens that a row of running text is continued from."""

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SHOWN_ERROR_LINES = 15
_MIN_EQUAL_UNCACHED = 0.5
"""Roundings turn a few tokens, above all in bfloat16; a cache that is not used turns nearly all."""
_POLL_S = 0.5
_STOPPED = "the export was not compared yet and begins anew"


@dataclass(frozen=True)
class Probe:
    """A few test rows: whole ones for the logits, their prompts for generation; left-padded, int64 (B, L)."""

    input_ids_BL: Tensor
    mask_BL: Tensor
    prompt_ids_BL: Tensor
    prompt_mask_BL: Tensor
    prompts: list[str]
    prompt_tokens: list[list[int]]
    """The prompts' tokens as in training: BOS (where there is one) first."""
    num_new_tokens: int = PROBE_NEW_TOKENS
    """Generated after each prompt."""

    @property
    def num_positions(self) -> int:
        return min(PROBE_POSITIONS, self.input_ids_BL.shape[1])


@dataclass(frozen=True)
class ProbeAnswer:
    """Float32 logits (B, K, V) at the last K positions, and prompt + generated tokens (B, L + new)."""

    logits_BKV: Tensor
    tokens_BL: Tensor


def make_probe(
    split: TokenizedSplit, prompts: Sequence[str] | None, pad_id: int, *, num_positions: int | None = None
) -> Probe:
    """The first rows of a split.

    Args:
        prompts: the rows' prompts as text; None where rows are running text: their first tokens are continued then, and
            which texts the tokenizers are compared on is left to the caller.
        num_positions: of the model, where they are a table: no more tokens are generated than it has room for.
    """
    cpu = torch.device("cpu")
    rows = [split[index] for index in range(min(PROBE_ROWS, len(split)))]
    whole = left_pad([row for row, _ in rows], pad_id, cpu)
    if prompts is None:
        rows = [(row, min(_TEXT_PROMPT, len(row) - 1)) for row, _ in rows]
    prompt_rows = [row[:prompt_length] for row, prompt_length in rows]
    prompt_batch = left_pad(prompt_rows, pad_id, cpu)
    return Probe(
        input_ids_BL=whole["input_ids"],
        mask_BL=whole["attention_mask"],
        prompt_ids_BL=prompt_batch["input_ids"],
        prompt_mask_BL=prompt_batch["attention_mask"],
        prompts=list((prompts or [])[: len(rows)]),
        prompt_tokens=[] if prompts is None else [row.tolist() for row in prompt_rows],
        num_new_tokens=min(PROBE_NEW_TOKENS, room_for_answers(num_positions, prompt_batch["input_ids"].shape[1])),
    )


@torch.inference_mode()
def answer_probe(model: Any, probe: Probe, *, eos_id: int, pad_id: int) -> ProbeAnswer:
    """The answer of a model in this process."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    logits = model(
        input_ids=probe.input_ids_BL.to(device),
        attention_mask=probe.mask_BL.to(device),
        position_ids=(probe.mask_BL.cumsum(1) - 1).clamp_min(0).to(device),
        use_cache=False,
        logits_to_keep=probe.num_positions,
    ).logits
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=probe.num_new_tokens,
        min_new_tokens=probe.num_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    tokens = model.generate(input_ids=probe.prompt_ids_BL.to(device), attention_mask=probe.prompt_mask_BL.to(device))
    return ProbeAnswer(logits.float().cpu(), tokens.cpu())


def answer_in_clean_process(
    model_folder: Path, probe: Probe, *, device: torch.device, trust_remote_code: bool
) -> tuple[ProbeAnswer, dict[str, Any]]:
    """The exported folder's answer from an interpreter without this project or network, and facts about the load.

    Raises:
        ModelError: the folder does not load there, lacks weights, or its tokenizer gives other tokens.
        Interrupted: a signal came.
    """
    request = {
        "task": "generate",
        "trust_remote_code": trust_remote_code,
        "logits_to_keep": probe.num_positions,
        "max_new_tokens": probe.num_new_tokens,
        "texts": probe.prompts,
    }
    tensors, facts = ask_clean_process(
        model_folder,
        {
            "input_ids": probe.input_ids_BL,
            "attention_mask": probe.mask_BL,
            "prompt_ids": probe.prompt_ids_BL,
            "prompt_mask": probe.prompt_mask_BL,
        },
        request,
        device,
    )
    _check_decoding(model_folder, facts)
    check_tokens(
        model_folder,
        (
            len(tokens) >= len(expected) - 1 and tokens == expected[len(expected) - len(tokens) :]
            for tokens, expected in zip(facts["encoded_prompts"], probe.prompt_tokens, strict=True)
        ),
    )
    return ProbeAnswer(tensors["logits"], tensors["tokens"]), facts


def ask_clean_process(
    model_folder: Path, tensors: Mapping[str, Tensor], request: Mapping[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run clean_reload.py on an exported folder: its answer, and facts about the load.

    Raises:
        ModelError: the folder does not load there, lacks weights, or the project was imported.
        Interrupted: a signal came.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="hedgehog-reload-") as name:
        folder = Path(name)
        save_file(dict(tensors), folder / "request.safetensors")
        whole_request = {
            "model": str(model_folder.resolve()),
            "device": str(device),
            "num_threads": torch.get_num_threads(),
            **request,
        }
        (folder / "request.json").write_text(json.dumps(whole_request), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER_VARIABLES}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(folder / "modules"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        script = Path(__file__).with_name("clean_reload.py")
        returncode, error_output = _run_stoppable([sys.executable, "-I", str(script), str(folder)], environment, folder)
        if returncode != 0:
            lines = error_output.strip().splitlines()[-_SHOWN_ERROR_LINES:]
            raise ModelError(
                f"the export in {model_folder} does not load in a clean process (exit status {returncode}):\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        facts = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        answer = load_file(folder / "answer.safetensors")
    for kind in ("missing_keys", "unexpected_keys"):
        if facts[kind]:
            raise ModelError(f"the export in {model_folder} has {kind.replace('_', ' ')}: {', '.join(facts[kind][:3])}")
    if facts["project_modules"]:
        raise ModelError(f"the clean process imported the project: {facts['project_modules']}")
    return answer, facts


def _run_stoppable(command: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Run a program to its end and return its status and error output; a signal to this process ends it too."""
    with subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            while True:
                try:
                    _, error_output = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    stop_if_asked(_STOPPED)
        except BaseException:
            process.kill()
            raise
    stopped_child(process.returncode, _STOPPED)
    return process.returncode, error_output


def _check_decoding(model_folder: Path, facts: dict[str, Any]) -> None:
    if facts["equal_uncached_share"] < _MIN_EQUAL_UNCACHED:
        raise ModelError(
            f"the export in {model_folder} decodes other tokens from its cache than without one (equal "
            f"{facts['equal_uncached_share']:.0%}): this version of transformers does not fit; see constraints.txt"
        )


def check_tokens(model_folder: Path, are_equal: Iterable[bool]) -> None:
    """
    Raises:
        ModelError: the exported tokenizer gave other tokens of some text than prepare's.
    """
    if not all(are_equal):
        raise ModelError(
            f"the tokenizer in {model_folder} does not give the tokens that prepare gave: it differs from the "
            "one that the run used"
        )


def measure_drift(reference: ProbeAnswer, exported: ProbeAnswer, probe: Probe) -> dict[str, float | int]:
    """Differences over the real positions; the reference is the unmerged model.

    - logits: largest and mean absolute difference, and relative ‖Δ‖ / ‖reference‖
    - next-token distributions: mean and largest KL(reference ‖ exported) in nats, share of equal argmax
    - greedy tokens: share that is equal, position by position

    Raises:
        ModelError: the exported logits are not finite.
    """
    kept_BK = probe.mask_BL[:, -probe.num_positions :].bool()
    of_logits = logit_drift(reference.logits_BKV[kept_BK], exported.logits_BKV[kept_BK])
    prompt_length = probe.prompt_ids_BL.shape[1]
    new_BL, exported_new_BL = reference.tokens_BL[:, prompt_length:], exported.tokens_BL[:, prompt_length:]
    return {
        **of_logits,
        "num_generated_tokens": new_BL.numel(),
        "equal_generated_share": float((new_BL == exported_new_BL).double().mean()),
    }


def logit_drift(reference_NV: Tensor, exported_NV: Tensor) -> dict[str, float | int]:
    """The figures of `measure_drift` about logits, over N positions or rows.

    Raises:
        ModelError: the exported logits are not finite.
    """
    reference_NV, exported_NV = reference_NV.double(), exported_NV.double()
    if not bool(torch.isfinite(exported_NV).all()):
        raise ModelError(
            "the exported model gives logits that are not finite: its weights overflow in export.dtype; choose "
            "bfloat16 or float32"
        )
    difference_NV = exported_NV - reference_NV
    log_p_NV, log_q_NV = reference_NV.log_softmax(-1), exported_NV.log_softmax(-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).clamp_min(0)
    return {
        "num_positions": len(reference_NV),
        "logits_max_abs": float(difference_NV.abs().max()),
        "logits_mean_abs": float(difference_NV.abs().mean()),
        "logits_relative": float(difference_NV.norm() / reference_NV.norm()),
        "kl_mean_nats": float(kl_N.mean()),
        "kl_max_nats": float(kl_N.max()),
        "equal_argmax_share": float((reference_NV.argmax(-1) == exported_NV.argmax(-1)).double().mean()),
    }
