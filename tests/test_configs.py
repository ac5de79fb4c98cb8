"""Every YAML in configs/ is valid, says how it is run, and its command in the header names it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hedgehog.pipeline.config_loading import load_config, variant_configs
from hedgehog.pipeline.families import shape_from_fields
from hedgehog.pipeline.validation import validate_config

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
WORLD_SIZES = {"llama2-70b-samsum": 8}


def overrides_for(file: Path, tmp_path: Path) -> list[str]:
    """What the command line has to give: a Llama's folder and rows, where the YAML leaves them open."""
    if not file.stem.startswith("small-llama-"):
        return []
    llama = tmp_path / "llama"
    llama.mkdir(parents=True)
    sizes = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    (llama / "config.json").write_text(json.dumps(sizes))
    (llama / "tokenizer.json").write_text("{}")
    shapes = shape_from_fields(sizes).tensor_shapes()
    save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, llama / "model.safetensors")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": str(i), "dialogue": f"A: {i}", "summary": "so"} for i in range(500)]))
    return [f"model.base={llama}", f"data.train_file={rows}", f"data.test_file={rows}"]


def test_there_are_configs():
    names = {"llama2-7b-samsum", "llama2-7b-samsum-qlora", "llama2-70b-samsum", "small-llama-samsum"}
    assert names <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_valid(file, tmp_path):
    world_size = WORLD_SIZES.get(file.stem, 1)
    report = validate_config(file, overrides_for(file, tmp_path), world_size=world_size)
    assert report.errors == []
    assert report.memory, "its model's sizes are known without a network"
    kind = load_config(file, overrides_for(file, tmp_path / "again")).data.kind
    assert all(entry.num_steps for entry in report.batches) or kind != "dialogues", "prepare counts the others' rows"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_header_shows_the_command(file):
    header = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    assert any(f" run configs/{file.name}" in " ".join(line.split()) for line in header)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_name_of_a_run_is_its_files(file, tmp_path):
    assert load_config(file, overrides_for(file, tmp_path)).name == file.stem


def test_the_small_llamas_variants_are_the_papers_table(tmp_path):
    file = FOLDER / "small-llama-samsum.yaml"
    config = load_config(file, overrides_for(file, tmp_path))
    variants = variant_configs(config)
    labels = {config.label, *(variant.label for variant in variants.values())}
    assert labels == {"zero-shot", "softmax + LoRA", "T2R + LoRA", "1+ELU + LoRA", "Hedgehog + LoRA"}
    for variant in variants.values():
        budgets = (variant.finetune.epochs, variant.finetune.lora, variant.finetune.global_batch_size)
        assert budgets == (config.finetune.epochs, config.finetune.lora, config.finetune.global_batch_size)


def test_the_papers_settings_at_7b():
    config = load_config(FOLDER / "llama2-7b-samsum.yaml")
    assert config.model.feature_dim == 128
    assert config.distill.epochs == 2
    assert (config.finetune.lora.rank, config.finetune.lora.alpha) == (8, 16)
    assert config.finetune.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_qlora_fits_24_gb():
    report = validate_config(FOLDER / "llama2-7b-samsum-qlora.yaml")
    assert max(estimate.num_bytes for estimate in report.memory) < 0.9 * 24e9


def test_70b_trains_on_80_gb_cards():
    report = validate_config(FOLDER / "llama2-70b-samsum.yaml", world_size=8)
    training = [estimate for estimate in report.memory if estimate.stage in ("distill", "finetune")]
    assert max(estimate.num_bytes for estimate in training) < 0.9 * 80e9
