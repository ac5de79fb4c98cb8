"""A run whose prepare, distill and finetune are finished: tiny random weights instead of training."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import apply_variant
from hedgehog.pipeline.data.tokenize import TextEncoder, render_prompt
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.families import lora_modules
from hedgehog.pipeline.llama.shape import LlamaShape
from hedgehog.pipeline.manifest import Manifest, describe_artifact
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.stage_context import StageContext

DIALOGUES = [
    ("Ann: Lunch at 1? Bob: Yes!", "Ann and Bob have lunch at 1."),
    ("Cem: I can't come. Dee: Pity.", "Cem can't come."),
    ("Eva: Where are you? Finn: On the bus, ten minutes. Eva: OK", "Finn arrives in ten minutes."),
    ("Gil: Tickets? Hana: Sold out.", "The tickets are sold out."),
    ("Ida: Zoë's café opens today 😀 Jon: Let's go", "Ida and Jon go to Zoë's café. It opens today."),
    ("Kim: Done. Lea: Thanks a lot, you saved me!", "Kim helped Lea."),
    ("Max: Call me. Nia: Later", "Nia calls Max later."),
]
SEEN_IN_TRAIN = {3}


def save_byte_tokenizer(folder: Path) -> Any:
    """A tokenizer of single bytes: <unk> 0, <s> 1, </s> 2, then 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_tiny_llama(folder: Path, *, num_key_value_heads: int = 2, tie_word_embeddings: bool = False) -> None:
    """2 layers, 4 heads of 8, 264 tokens; weights large enough that attention and argmax are not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
        tie_word_embeddings=tie_word_embeddings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _finish(folder: Path, stage: str, artifacts: dict[str, str], summary: dict[str, Any], skipped: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Manifest(
        stage=stage,
        status="done",
        skipped=skipped,
        fingerprint="",
        config={},
        artifacts={name: describe_artifact(folder, path) for name, path in artifacts.items()},
        summary=summary,
        duration_s=90.0,
        peak_memory_bytes=3 << 20,
        finished_at="2026-01-01T00:00:00+00:00",
    ).write(folder)


def _finish_prepare(config: RunConfig, folder: Path, **llama_options: Any) -> None:
    folder.mkdir(parents=True)
    save_tiny_llama(folder / "base_model", **llama_options)
    tokenizer = save_byte_tokenizer(folder / "base_model")
    encoder = TextEncoder(tokenizer)
    prompts = [render_prompt(config.data.prompt_template, dialogue) for dialogue, _ in DIALOGUES]
    summaries = encoder.summaries([summary for _, summary in DIALOGUES])
    TokenizedSplit.from_rows(zip(encoder.prompts(prompts), summaries, strict=True)).write(
        folder / "tokens_test.safetensors"
    )
    rows = [
        {
            "id": f"d{index}",
            "dialogue": dialogue,
            "summary": summary,
            "prompt": prompts[index],
            "seen_in_train": index in SEEN_IN_TRAIN,
        }
        for index, (dialogue, summary) in enumerate(DIALOGUES)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "examples_test.jsonl").write_text(text, encoding="utf-8")
    base = str(folder / "base_model")
    artifacts = {
        "base_model": "base_model",
        "tokens_test": "tokens_test.safetensors",
        "examples_test": "examples_test.jsonl",
    }
    _finish(folder, "prepare", artifacts, {"base_model": base, "tokenizer": base}, None)


def _finish_training(config: RunConfig, run_folder: RunFolder, variant: str | None) -> None:
    """distill and finetune with random feature maps and a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from hedgehog.pipeline.modeling.convert import feature_map_modules, load_hedgehog, save_feature_maps

    distill, finetune = run_folder.stage("distill", variant), run_folder.stage("finetune", variant)
    distill.mkdir(parents=True)
    finetune.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(variant or ""))
    model = LlamaForCausalLM.from_pretrained(run_folder.stage("prepare") / "base_model")
    linear = config.model.attention == "linear"
    if linear:
        model = load_hedgehog(
            model,
            feature_map=config.model.feature_map,
            feature_dim=config.model.feature_dim,
            feature_map_options=config.model.feature_map_options,
        )
        for module in feature_map_modules(model).values():
            for weight in module.parameters():
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        save_feature_maps(distill / "feature_maps.safetensors", model)
        _finish(distill, "distill", {"feature_maps": "feature_maps.safetensors"}, {"kl_mean": 0.25}, None)
    else:
        _finish(distill, "distill", {}, {}, "softmax attention has no feature maps")
    if not config.finetune.enabled:
        _finish(finetune, "finetune", {}, {}, "finetune.enabled is false")
        return
    artifacts = {"adapter": "adapter"}
    if linear:
        shutil.copy(distill / "feature_maps.safetensors", finetune)
        artifacts["feature_maps"] = "feature_maps.safetensors"
    lora = config.finetune.lora
    modules = list(lora_modules(lora, LlamaShape))
    peft_model = get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=modules))
    for name, weight in peft_model.named_parameters():
        if "lora_" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    peft_model.save_pretrained(finetune / "adapter")
    _finish(finetune, "finetune", artifacts, {"validation_loss": 5.0}, None)


@pytest.fixture(scope="session")
def make_finished_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """Returns make(**config sections, llama={…}) → RunConfig of a new run, ready for evaluate and export."""

    def make(*, llama: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        config = RunConfig.model_validate(
            {
                "name": "run",
                "output_dir": str(tmp_path_factory.mktemp("runs")),
                "data": {"prompt_template": "{dialogue}\n=>"},
                "engine": {"device": "cpu", "precision": "float32", "cpu_threads": 1},
                "evaluate": {"batch_size": 3, "max_new_tokens": 8, "bootstrap_samples": 50},
                **sections,
            }
        )
        run_folder = RunFolder.of(config)
        _finish_prepare(config, run_folder.stage("prepare"), **(llama or {}))
        _finish_training(config, run_folder, None)
        for variant in config.variants:
            _finish_training(apply_variant(config, variant), run_folder, variant)
        return config

    return make


@pytest.fixture(scope="session")
def finished_run(make_finished_run: Callable[..., RunConfig]) -> RunConfig:
    """main (hedgehog_softmax), softmax + LoRA and softmax without training. Do not run stages in it: copy it."""
    return make_finished_run(
        variants={
            "softmax": {"label": "softmax + LoRA", "overrides": {"model.attention": "softmax"}},
            "zero_shot": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}},
        }
    )


@pytest.fixture
def copied_run(finished_run: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of `finished_run` for one test alone."""
    shutil.copytree(finished_run.output_dir, tmp_path / "runs")
    return finished_run.model_copy(update={"output_dir": str(tmp_path / "runs")})


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., RunConfig]:
    """tiny_config(root, **sections): a run `g` that makes a GPT-2 of 60,000 weights, softmax attention beside it."""

    def make(root: Path, **sections: Any) -> RunConfig:
        schedule = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 4}
        values: dict[str, Any] = {
            "name": "g",
            "output_dir": str(root),
            "tiny": {
                "architecture": "gpt2",
                "num_train_dialogues": 30,
                "num_validation_dialogues": 5,
                "num_test_dialogues": 6,
                "vocab_size": 400,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "pretrain_steps": 6,
                "pretrain_batch_size": 4,
            },
            "data": {"max_length_tokens": 512},
            "distill": schedule,
            "finetune": schedule,
            "evaluate": {"batch_size": 3, "max_new_tokens": 8, "bootstrap_samples": 20},
            "engine": {"zero_stage": 0, "precision": "float32", "device": "cpu", "cpu_threads": 1},
            "export": {"dtype": "float32"},
            "variants": {"softmax": {"overrides": {"model.attention": "softmax"}}},
        }
        return RunConfig.model_validate({**values, **sections})

    return make


@dataclasses.dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks in threads, of which one at a time runs: what they call is safe between processes, not threads."""

    meeting: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(1))
    turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    board: dict[str, Any] = dataclasses.field(default_factory=dict)

    def barrier(self) -> None:
        self.turn.release()
        try:
            self.meeting.wait()
        finally:
            self.turn.acquire()

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.board["value"] = value
        self.barrier()
        value = self.board["value"]
        self.barrier()
        return value

    def gather(self, value: Any) -> list[Any]:
        self.board[f"of {self.rank}"] = value
        self.barrier()
        values = [self.board[f"of {rank}"] for rank in range(self.world_size)]
        self.barrier()
        return values


def _in_two_threads(run: Callable[[StageContext], Any]) -> Callable[[StageContext], Any]:
    """A stage's `run` as two ranks would run it."""

    def run_in_two_threads(ctx: StageContext) -> Any:
        first = ThreadWorld(0, 2, 0, torch.device("cpu"), meeting=threading.Barrier(2))
        outcomes: dict[int, Any] = {}

        def run_rank(world: ThreadWorld) -> None:
            with world.turn:
                try:
                    outcomes[world.rank] = run(dataclasses.replace(ctx, world=world))
                except BaseException as error:
                    outcomes[world.rank] = error
                    world.meeting.abort()  # or the other rank would wait for ever

        threads = [
            threading.Thread(target=run_rank, args=(dataclasses.replace(first, rank=rank),)) for rank in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [outcome for outcome in outcomes.values() if isinstance(outcome, BaseException)]
        if errors:
            raise errors[0]
        return outcomes[0]

    return run_in_two_threads


@pytest.fixture(scope="session")
def in_two_threads() -> Callable[[Callable[[StageContext], Any]], Callable[[StageContext], Any]]:
    """`in_two_threads(evaluate.run)`: a stage's `run` as two ranks would run it."""
    return _in_two_threads
