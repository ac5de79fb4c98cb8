"""`validate` finds every fault that shows without a GPU or the network, and does the arithmetic."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hedgehog.pipeline.families import shape_from_fields
from hedgehog.pipeline.manifest import Manifest
from hedgehog.pipeline.validation import validate_config, validate_configs

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama's folder, 60 training rows (one of them twice), 5 test rows, and a config."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    shapes = shape_from_fields(LLAMA).tensor_shapes()
    save_file({name: np.zeros(sizes, np.float16) for name, sizes in shapes.items()}, weights_of(tmp_path))
    rows = [{"id": str(i), "dialogue": f"Ann: {i}?\nBen: yes", "summary": f"Ben agrees to {i}."} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, rows[0]]))
    (tmp_path / "test.json").write_text(json.dumps(rows[:5]))
    (tmp_path / "config.yaml").write_text(
        "name: trial\n"
        f"model: {{base: {tmp_path}/llama}}\n"
        f"data: {{train_file: {tmp_path}/train.jsonl, test_file: {tmp_path}/test.json, max_length_tokens: 128,\n"
        "       num_validation_examples: 10}\n"
        "engine: {device: cpu, precision: float32}\n"
        "variants: {soft: {overrides: {model.attention: softmax}}}\n"
    )
    return tmp_path


def weights_of(folder: Path) -> Path:
    return folder / "llama" / "model.safetensors"


def errors(folder: Path, *overrides: str, world_size: int = 1) -> list[str]:
    return validate_config(folder / "config.yaml", overrides, world_size=world_size).errors


def test_batch_arithmetic(folder):
    overrides = ["distill.epochs=2", "finetune.max_steps=7", "finetune.global_batch_size=16"]
    report = validate_config(folder / "config.yaml", overrides, world_size=2)
    assert report.errors == []
    distill, finetune = report.batches
    # 61 rows less one duplicate less 10 for validation; two epochs in batches of 8
    assert (distill.num_rows, distill.num_steps, distill.num_accumulation) == (50, 13, 4)
    assert (finetune.num_steps, finetune.num_accumulation) == (7, 8)
    assert finetune.max_tokens_per_step == 16 * 128
    assert {estimate.title for estimate in report.memory} == {
        "distill", "finetune", "finetune (soft)", "evaluate", "export",
    }  # fmt: skip


def test_steps_of_packed_rows_are_not_guessed(folder):
    report = validate_config(folder / "config.yaml", ["distill.packing=true"])
    assert [entry.num_steps is None for entry in report.batches] == [True, False]


def test_every_fault_is_told_at_once(folder):
    found = errors(
        folder,
        "finetune.lora.target_modules=[q_prj, v_proj]",
        "model.feature_map=hedgehog",
        "distill.layers=0-2",
        "data.test_file=/nowhere/test.json",
        "model.tokenizer=/nowhere/tokenizer",
        "engine.deepspeed_config=/nowhere/ds.json",
        world_size=3,
    )
    for part in (
        "distill.global_batch_size: 8 is not a multiple of micro_batch_size 1 x 3 processes",
        "finetune.global_batch_size: 8 is not a multiple",
        "model.feature_map: unknown feature map 'hedgehog'; known: hedgehog_softmax",
        "finetune.lora.target_modules: unknown module q_prj; did you mean q_proj?",
        "distill.layers: 0-2 asks for layer 2; the model has layers 0 to 1",
        "data.test_file: there is no file /nowhere/test.json",
        "model.tokenizer: /nowhere/tokenizer is no folder",
        "engine.deepspeed_config: cannot read /nowhere/ds.json",
    ):
        assert any(part in error for error in found), part
    assert len(found) == 8, "a variant that inherits a fault does not repeat it"


KINDS: dict[str, tuple[list[str], str]] = {
    "no override": (["epochs"], "epochs: not an override"),
    "unknown key": (["finetune.lora.rnk=4"], "finetune.lora.rnk (command line): unknown key; did you mean"),
    "wrong type": (["distill.epochs=x"], 'distill.epochs (command line): expected a number > 0, got "x"'),
    "out of range": (
        ["evaluate.batch_size=0"],
        "evaluate.batch_size (command line): expected a whole number ≥ 1, got 0",
    ),
    "two keys of a section": (["distill.cross_entropy_weight=0"], "this and output_mse_weight cannot both be 0"),
    "two sections": (
        ["engine.zero_stage=0", "engine.offload_optimizer=true"],
        "engine.offload_optimizer (command line): needs ZeRO",
    ),
    "template": (["data.prompt_template=x"], "data.prompt_template (command line): must contain {dialogue}"),
    "variant": (
        ["variants.soft.overrides.finetune.micro_batch_size=3"],
        "variants.soft.overrides.finetune.global_batch_size (line 6): 8 is not a multiple of micro_batch_size 3",
    ),
    "batches": (
        ["distill.global_batch_size=9", "distill.micro_batch_size=2"],
        "distill.global_batch_size (command line): 9 is not a multiple of micro_batch_size 2",
    ),
    "feature map": (["model.feature_map=hedgehog"], "model.feature_map (command line): unknown feature map"),
    "module": (["finetune.lora.target_modules=[fc1]"], "target_modules (command line): unknown module fc1"),
    "layers": (["distill.layers=0-2"], "distill.layers (command line): 0-2 asks for layer 2"),
    "base": (["model.base={folder}/other"], "has neither model.safetensors"),
    "tokenizer": (["model.tokenizer=/nowhere/t"], "model.tokenizer (command line): /nowhere/t is no folder"),
    "missing file": (["data.test_file=/nowhere/test.json"], "data.test_file (command line): there is no file"),
    "rows": (
        ["data.validation_file={folder}/bad.jsonl"],
        "data.validation_file (command line): {folder}/bad.jsonl:1: ",
    ),
    "DeepSpeed": (["engine.deepspeed_config=/nowhere/ds.json"], "deepspeed_config (command line): cannot read"),
    "Slurm's key": (["slurm.partitoin=gpu"], "slurm.partitoin (command line): unknown key; did you mean slurm.part"),
    "Slurm's time": (["slurm.time=3"], "slurm.time (command line): 3 is 180 s, too short"),
    "Slurm's tasks": (["slurm.finetune.gpus=3"], "(slurm: 1 nodes x 3 tasks)"),
    "Slurm's cluster": (["slurm.sbatch_lines=-M far"], "-M far: jobs on another cluster"),
}
"""Kinds of mistakes: overrides, and what is told."""


@pytest.fixture
def placed(folder):
    """`placed(*kinds)`: what is told of these mistakes together, and what should be."""
    (folder / "bad.jsonl").write_text("{\n")
    (folder / "other").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / "other" / name).write_bytes((folder / "llama" / name).read_bytes())

    def ask(*kinds: str) -> tuple[list[str], list[str]]:
        overrides = [text.replace("{folder}", str(folder)) for kind in kinds for text in KINDS[kind][0]]
        found = validate_config(folder / "config.yaml", overrides).placed_errors
        return found, [KINDS[kind][1].replace("{folder}", str(folder)) for kind in kinds]

    return ask


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_of_mistake_hides_another(placed, kind):
    (alone,), (expected,) = placed(kind)
    assert expected in alone
    for other in KINDS:
        if other != kind:
            found, told = placed(kind, other)
            assert all(any(part in line for line in found) for part in told), (other, found)
            assert len(found) == 2, (other, found)


def test_all_kinds_of_mistakes_are_told_at_once(placed):
    found, told = placed(*KINDS)
    assert not [part for part in told if not any(part in line for line in found)], found


def test_what_only_follows_from_a_mistake_is_not_told(folder):
    """A default stands where a value could not be used, and says nothing of the user's config."""
    text = (folder / "config.yaml").read_text()
    for right, wrong, told in (
        ("data: {", "data: {dialogue_field: 3, ", "data.dialogue_field: expected text"),
        ("num_validation_examples: 10", "num_validation_examples: many", "data.num_validation_examples: expected a wh"),
        (f"base: {folder}/llama", "base: [llama]", "model.base: expected text or null"),
        (
            "engine: {",
            "engine: {offload_optimizer: true, zero_stage: 7, ",
            "engine.zero_stage: expected one of 0, 1, 2",
        ),
        ("model:", "modle:", "modle: unknown key; did you mean model?"),
        ("{base:", "{bse:", "model.bse: unknown key; did you mean model.base?"),
        ("data:", "dta:", "dta: unknown key; did you mean data?"),
    ):
        assert right in text
        (folder / "config.yaml").write_text(text.replace(right, wrong, 1))
        (error,) = errors(folder, "distill.layers=1")
        assert error.startswith(told)


def test_a_fault_of_two_variants_is_told_of_both(folder):
    names = ("one", "two")
    found = errors(folder, *[f"variants.{name}.overrides.finetune.lora.target_modules=[fc1]" for name in names])
    assert [error.split(".")[1] for error in found] == list(names)


def test_a_wrong_option_of_a_feature_map_is_told_under_its_key(folder):
    for value in ("{init: 3}", "{init_scale: big}"):
        (error,) = errors(folder, f"model.feature_map_options={value}")
        assert error.startswith("model.feature_map_options: init") and "must be" in error


def test_a_variants_own_faults_are_told(folder):
    found = errors(folder, "variants.soft.overrides={model.feature_map: elu, model.feature_dim: 5}")
    assert len(found) == 1
    assert found[0].startswith("variants.soft.overrides.model.feature_map: feature map 'elu' has no projection")
    found = errors(folder, "variants.soft.overrides={finetune.lora.target_modules: [fc1]}")
    assert found == [
        "variants.soft.overrides.finetune.lora.target_modules: unknown module fc1; a Llama's are q_proj, k_proj, "
        "v_proj, o_proj, gate_proj, up_proj, down_proj."
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            json.dumps({**LLAMA, "hidden_size": 32, "head_dim": 16}),
            "embed_tokens.weight has shape [512, 64], config.json",
        ),
        (json.dumps({**LLAMA, "attention_dropout": 0.1}), "attention_dropout 0.1, but linear attention has no"),
        (json.dumps({**LLAMA, "quantization_config": {"quant_method": "gptq"}}), "quantized already (gptq)"),
        (json.dumps({**LLAMA, "model_type": "mistral"}), "model_type 'mistral'; only Llama, GPT-2 and BERT models"),
        ("{", "cannot be read as JSON"),
        ("[]", "model_type None"),
        (json.dumps({"model_type": "llama", "hidden_size": 64}), "lacks num_hidden_layers, num_attention_heads"),
        (None, "has no config.json"),
    ],
)
def test_a_base_that_cannot_be_converted(folder, content, expected):
    file = folder / "llama" / "config.json"
    file.unlink() if content is None else file.write_text(content)
    (error,) = errors(folder)
    assert error.startswith("model.base: ")
    assert expected in error


def test_a_base_without_whole_weights_or_a_tokenizer(folder):
    weights = weights_of(folder)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    assert "truncated or not a safetensors file" in errors(folder)[0]
    weights.unlink()
    (folder / "llama" / "tokenizer.json").unlink()
    missing, tokenizer = errors(folder)
    assert missing.startswith("model.base: ") and "has neither model.safetensors nor" in missing
    assert tokenizer.startswith("model.base: ") and "has no tokenizer.json" in tokenizer


def test_a_softmax_run_may_drop_attention_weights(folder):
    (folder / "llama" / "config.json").write_text(json.dumps({**LLAMA, "attention_dropout": 0.1}))
    assert errors(folder, "model.attention=softmax") == []


def test_a_base_that_is_nowhere(folder):
    assert errors(folder, "model.base=/nowhere/llama") == ["model.base: /nowhere/llama: no such folder."]
    report = validate_config(folder / "config.yaml", ["model.base=somebody/llama"])
    assert report.errors == [] and report.memory == []
    assert any("somebody/llama is on the hub" in note for note in report.notes)
    report = validate_config(folder / "config.yaml", ["data.dataset=samsum", "data.train_file="])
    assert any("samsum is on the hub" in note for note in report.notes), "or a folder's name that is mistyped"


def test_text_without_its_perplexity_has_nothing_to_measure(folder):
    (error,) = errors(folder, "data.kind=text", "data.text_field=dialogue", "evaluate.perplexity=false")
    assert error == "evaluate.perplexity: false leaves nothing to measure on running text."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "data.test_file: {file}: is empty"),
        (b"x\xff\n", "{file}:1: not UTF-8 text"),
    ],
)
def test_text_is_looked_at_before_anything_slow(folder, tmp_path, content, expected):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    (error,) = errors(folder, "data.kind=text", "data.text_field=dialogue", f"data.test_file={file}")
    assert expected.format(file=file) in error


def test_the_field_of_texts_is_looked_for(folder):
    assert all(
        "no field 'text'" in error and "set data.text_field" in error for error in errors(folder, "data.kind=text")
    )


def test_rows_that_are_no_json(folder):
    (folder / "train.jsonl").write_text('{"dialogue": "a", "summary": "b"}\n{"dialogue": \n')
    (error,) = errors(folder)
    assert "train.jsonl:2" in error


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.label_field=x", "the section `tiny` makes the data"),
        ("data.test_split=validation", "the section `tiny` makes the data"),
        ("evaluate.max_new_tokens=3", "data.kind is classification"),
        ("model.chunk_size=32", "data.kind is classification"),
    ],
)
def test_what_a_tiny_encoder_does_not_look_at_is_noted(override, why):
    file = Path(__file__).parents[2] / "configs/tiny-bert.yaml"
    key = override.partition("=")[0]
    assert f"{key}: has no effect while {why}." in validate_config(file, [override]).notes
    assert not any("has no effect" in note for note in validate_config(file).notes)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.max_length_tokens=300"], "300 is more than the 256 tokens"),
        (["data.max_length_tokens=200"], "200 tokens of a prompt and 96 new ones pass the base model's 256"),
        (["finetune.train_feature_maps=false", "finetune.feature_map_learning_rate=1e-3"], "has no effect"),
        (["distill.max_steps=3", "distill.epochs=2"], "distill.epochs: has no effect while max_steps is set"),
        (["model.attention=softmax", "model.feature_dim=8"], "has no effect while model.attention is softmax"),
        (
            ["distill.query_fraction=0.5", "data.max_length_tokens=64"],
            "distill.query_fraction: has no effect on rows of at most 64 tokens, which are one block of 64",
        ),
        (
            ["data.kind=text", "data.text_field=dialogue", "data.overlong=truncate_dialogue"],
            "overlong: has no effect while data.kind is text",
        ),
        (["data.test_split=validation"], "data.test_split: has no effect"),
        (["data.text_end=nothing"], "data.text_end: has no effect while data.kind is dialogues"),
        (["data.label_field=x"], "data.label_field: has no effect while data.kind is dialogues"),
        (["data.text_field=x"], "data.text_field: has no effect while data.kind is dialogues"),
        (["engine.zero_stage=3"], "hold the whole model in every process"),
        (["distill.layers=0"], "joined by `hedgehog merge`"),
    ],
)
def test_settings_that_deserve_a_look_are_noted(folder, overrides, expected):
    report = validate_config(folder / "config.yaml", overrides)
    assert report.errors == []
    assert any(expected in note for note in report.notes)
    assert not any(expected in note for note in validate_config(folder / "config.yaml").notes)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["distill.layers=1"],
            "enter layer 1 take at most 1.6 MiB for 6,400 tokens of 50 rows",
        ),
        (["distill.layers=1", "engine.precision=bfloat16", "data.max_length_tokens=8192"], "50.0 MiB for 409,600 tok"),
        (["distill.layers=1"], "GiB are free there"),
        ([], "each element of `submit`'s array above the first takes"),
        (["distill.layers=0-1"], "has no effect: layer 0 is trained"),
        (
            ["distill.layers=1", "distill.epochs=1"],
            "has no effect: no row comes a second time; it pays from",
        ),
    ],
)
def test_kept_hidden_states_are_reckoned(folder, overrides, expected):
    overrides = ["distill.epochs=2", *overrides]
    report = validate_config(folder / "config.yaml", ["distill.cache_hidden_states=true", *overrides])
    assert report.errors == []
    (note,) = [note for note in report.notes if note.startswith("distill.cache_hidden_states: ")]
    assert expected in note
    assert not any("cache_hidden_states" in note for note in validate_config(folder / "config.yaml", overrides).notes)


def test_kept_hidden_states_are_reckoned_from_what_prepare_counted(folder):
    Manifest(
        stage="prepare",
        status="done",
        fingerprint="",
        config={},
        summary={"splits": {"train": {"used": 40, "tokens": 2**24}}},
    ).write(folder / "runs" / "trial" / "prepare")
    overrides = ["distill.cache_hidden_states=true", "distill.layers=1", "distill.epochs=2"]
    notes = validate_config(folder / "config.yaml", [*overrides, f"output_dir={folder}/runs"]).notes
    assert any("layer 1 take 4.0 GiB for 16,777,216 tokens of 40 rows" in note for note in notes)


def test_json_has_every_term_with_its_formula(folder, capsys):
    broken = folder / "broken.yaml"
    broken.write_text("name: x\nmodle: {}\n")
    assert not validate_configs([str(folder / "config.yaml"), str(broken)], [], world_size=1, as_json=True)
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["valid"], bad["valid"]) == (True, False)
    assert "unknown key; did you mean model?" in bad["errors"][0]
    for stage in good["memory"]:
        assert stage["num_bytes"] == pytest.approx(sum(term["num_bytes"] for term in stage["terms"]), abs=20)
        assert all(term["formula"] for term in stage["terms"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("width", [80, 100, 130])
def test_nothing_is_cut_on_a_terminal(folder, monkeypatch, capsys, width, device):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    name = "linear-attention"
    overrides = [f"variants.{name}.overrides.model.feature_map=relu", f"engine.device={device}"]
    overrides += ["model.base=meta-llama/Llama-2-7b-hf", "engine.precision=bfloat16"]
    assert validate_configs([str(folder / "config.yaml")], overrides, world_size=1, as_json=False)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in shown
    lines = [line.rstrip() for line in shown.splitlines() if str(folder) not in line]
    assert max(map(len, lines)) <= width
    words = set(shown.split())
    assert {"weights", "training", "activations", "overhead", "total", "attention", "distill", "evaluate"} <= words
    assert {f"({name})", "(soft)", f"{'GPU' if device == 'cuda' else 'CPU'}"} <= words
    assert ("outside" in words) == (device == "cuda")
    (total,) = [line for line in lines if re.match(r"\s*export ", line)]
    assert re.search(r" \d+\.\d\d +-$", total), "a row of figures is not torn"


def test_the_tables_show_steps_and_memory(folder, capsys):
    assert validate_configs([str(folder / "config.yaml")], [], world_size=2, as_json=False)
    shown = capsys.readouterr().out
    assert "valid (2 processes on cpu)" in shown
    assert "0.1 M weights, 2 layers, 4 heads (2 for keys and values) x 16" in shown
    assert "1 x 2 x 4" in shown
    assert "4.1 k weights, state 17.0 KiB a row" in shown
    assert "finetune (soft)" in shown
    rows = {line.split()[0]: line.split()[-1] for line in shown.splitlines() if "CPU memory" in line}
    assert "attention by" in shown
    assert (rows["distill"], rows["finetune"], rows["export"]) == ("PyTorch", "softmax", "-")
