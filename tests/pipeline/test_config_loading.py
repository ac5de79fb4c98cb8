"""A config's mistakes are all told at once, each with its key, its place and its cure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import (
    apply_variant,
    canonical,
    config_differences,
    dump_resolved,
    flatten,
    load_config,
    variant_configs,
)
from hedgehog.pipeline.errors import ConfigError

VALID = """\
name: trial
model: {base: some/llama}
data: {dataset: some/rows}
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def message(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def test_a_valid_file_gives_its_values_and_the_defaults(tmp_path):
    config = load_config(write(tmp_path, VALID + "finetune: {lora: {rank: 4}}\n"))
    assert (config.name, config.model.base, config.finetune.lora.rank) == ("trial", "some/llama", 4)
    assert config.finetune.lora.alpha == RunConfig.model_fields["finetune"].default.lora.alpha


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("finetune: {lora: {rnk: 4}}", "finetune.lora.rnk", "finetune.lora.rank"),
        ("finetune: {lora_rank: 4}", "finetune.lora_rank", "finetune.lora.rank"),
        ("finetune: {learning_rat: 1}", "finetune.learning_rat", "finetune.learning_rate"),
        ("engin: {zero_stage: 2}", "engin", "engine"),
        ("zero_stage: 2", "zero_stage", "engine.zero_stage"),
        ("model: {base: b, max_new_tokens: 2}", "model.max_new_tokens", "evaluate.max_new_tokens"),
        ("model: {base: b, max_new_token: 2}", "model.max_new_token", "evaluate.max_new_tokens"),
    ],
)
def test_an_unknown_key_brings_the_one_that_was_meant(tmp_path, text, key, meant):
    valid = VALID if "model:" not in text else VALID.replace("model: {base: some/llama}\n", "")
    shown = message(tmp_path, valid + text + "\n")
    assert f"{key} (line " in shown
    assert f"unknown key; did you mean {meant}?" in shown


def test_an_unknown_key_like_no_other_brings_the_keys_that_there_are(tmp_path):
    shown = message(tmp_path, VALID + "logging: {frobnicate: 1}\n")
    assert "logging.frobnicate (line 4): unknown key; logging has the keys tensorboard." in shown


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path):
    text = """\
name: "bad name"
model:
  base: some/llama
  feature_dim: 0
data: {dataset: some/rows, overlong: cut}
finetune:
  learning_rate: "3e-3"
  global_batch_size: 7
  micro_batch_size: 2
  lora: {rnk: 3}
engine: {zero_stage: 0, offload_optimizer: true}
variants:
  one: {overrides: {model.atention: softmax}}
"""
    shown = message(tmp_path, text, "distill.epochs=-1", "evaluate.min_new_tokens=200")
    for part in (
        "10 problems",
        "name (line 1): expected text (Name of the run folder: letters, digits and . _ - behind a letter or digit), "
        'got "bad name".',
        "model.feature_dim (line 4): expected a whole number ≥ 1 or null, got 0.",
        'data.overlong (line 5): expected one of drop, truncate_dialogue, truncate, got "cut".',
        'finetune.learning_rate (line 7): expected a number > 0, got "3e-3" (without the quotes it is a number).',
        "finetune.global_batch_size (line 8): 7 is not a multiple of micro_batch_size 2; take 6 or 8",
        "finetune.lora.rnk (line 10): unknown key; did you mean finetune.lora.rank?",
        "engine.offload_optimizer (line 11): needs ZeRO",
        "variants.one.overrides.model.atention (line 13): unknown key; did you mean model.attention?",
        "distill.epochs (command line): expected a number > 0, got -1.",
        "evaluate.min_new_tokens (command line): 200 is more than max_new_tokens 96.",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: true", "seed (line 4): expected a whole number ≥ 0, got true."),
        ("seed: 1.5", "seed (line 4): expected a whole number ≥ 0, got 1.5."),
        ("seed: 9223372036854775808", "must be below 2^63"),
        ("logging: {tensorboard: 1}", "logging.tensorboard (line 4): expected true or false, got 1."),
        ("distill: {epochs: .inf}", "distill.epochs (line 4): expected a number > 0, got Infinity."),
        ("distill: {layers: 9-8}", "the range 9-8 runs backwards"),
        ("distill: {layers: first}", "expected layers such as 8-15"),
        ("export: {max_shard_size: big}", "expected a size such as 5GB, 500MB or 1.5GiB, got"),
        ("export: {max_shard_size: 0GB}", "expected a size such as 5GB, 500MB or 1.5GiB"),
        ("export: {push_to_hub: a/b/c}", "Repository id (owner/name)"),
        ("label: 3", "expected text or null, got 3 (put text that looks like a number in quotes)."),
        ("finetune: {lora: {target_modules: [q_proj, 3]}}", "finetune.lora.target_modules.1 (line 4)"),
        ("variants: {one: 3}", "variants.one (line 4): expected a section with label and overrides, got 3."),
        ("finetune: 3", "finetune (line 4): expected a section (keys under it), got 3."),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(tmp_path, line, expected):
    assert expected in message(tmp_path, VALID + line + "\n")


def test_the_run_needs_a_base_model_and_rows(tmp_path):
    shown = message(tmp_path, "name: trial\n")
    for key in ("model.base: left open", "data.train_file: left open", "data.test_file: left open"):
        assert key in shown


def test_tiny_makes_its_inputs_itself(tmp_path):
    assert load_config(write(tmp_path, "name: trial\ntiny: {}\n")).tiny is not None
    shown = message(tmp_path, VALID + "tiny: {}\n")
    assert "model.base (line 2): the section `tiny` makes this input itself" in shown
    assert "data.dataset (line 3)" in shown


def test_a_tiny_bert_is_for_classification_and_classification_for_a_tiny_bert(tmp_path):
    tiny = "name: trial\ntiny: {architecture: %s}\ndata: {kind: %s}\n"
    assert load_config(write(tmp_path, tiny % ("bert", "classification"))).tiny is not None
    shown = message(tmp_path, tiny % ("bert", "dialogues"))
    assert "tiny.architecture (line 2): a bert is an encoder" in shown and "set data.kind to classification" in shown
    shown = message(tmp_path, tiny % ("gpt2", "classification"))
    assert "data.kind (line 3): classification needs an encoder" in shown and "tiny.architecture to bert" in shown
    assert "the section `tiny` makes dialogues" in message(tmp_path, tiny % ("llama", "text"))
    heads = "name: trial\ndata: {kind: classification}\ntiny: {architecture: bert, num_key_value_heads: 1}\n"
    assert "a bert has as many as query heads: leave it out" in message(tmp_path, heads)


@pytest.mark.parametrize(
    ("kind", "override", "expected"),
    [
        (
            "classification",
            "finetune.packing=true",
            "finetune.packing (command line): an encoder's rows are not joined",
        ),
        ("classification", "distill.packing=true", "distill.packing (command line): an encoder's rows are not joined"),
        ("classification", "data.overlong=truncate_dialogue", "have no dialogue to cut; take truncate, or drop."),
        (
            "dialogues",
            "data.overlong=truncate",
            "is for labelled rows; of dialogues take truncate_dialogue, or drop.",
        ),
        ("classification", "data.second_text_field=text", "text is the text or the label already"),
        ("classification", "data.second_text_field=label", "label is the text or the label already"),
        ("classification", "data.label_field=text", "data.label_field (command line): text is the text already"),
    ],
)
def test_what_does_not_go_with_the_kind_of_data(tmp_path, kind, override, expected):
    text = VALID.replace("some/rows", f"some/rows, kind: {kind}")
    assert load_config(write(tmp_path, text), ["data.overlong=drop"]).data.kind == kind
    assert expected in message(tmp_path, text, override)


def test_a_variant_packs_no_rows_to_classify_either(tmp_path):
    text = VALID.replace("some/rows", "some/rows, kind: classification")
    shown = message(tmp_path, text + "variants: {one: {overrides: {finetune.packing: true}}}\n")
    assert "variants.one.overrides.finetune.packing (line 4): an encoder's rows are not joined" in shown


def test_what_a_classifying_run_needs_is_named(tmp_path):
    shown = message(tmp_path, "name: trial\ndata: {kind: classification}\n")
    assert "hub id of a BERT, here" in shown and "give a .tsv, .csv, .json or .jsonl file" in shown


@pytest.mark.parametrize("overrides", [["engine.zero_stage=3"], ["engine.zero_stage=3", "model.quantization=int8"]])
def test_quantized_weights_cannot_be_sharded(tmp_path, overrides):
    text = VALID.replace("some/llama", "some/llama, quantization: nf4")
    assert "weights cannot be sharded" in message(tmp_path, text, *overrides)


def test_eight_bit_adam_cannot_be_offloaded(tmp_path):
    shown = message(tmp_path, VALID, "finetune.optimizer=adamw8bit", "engine.offload_optimizer=true")
    assert "adamw8bit cannot be offloaded" in shown


def test_yaml_faults_name_file_and_line(tmp_path):
    shown = message(tmp_path, "name: trial\nmodel: {base: x\n")
    assert "config.yaml:3: not valid YAML: while parsing a flow mapping (begun in line 2)" in shown
    assert "config.yaml:2: not valid YAML" in message(tmp_path, "name: trial\n\tmodel: 3\n")
    assert "config.yaml:2: not valid YAML" in message(tmp_path, "name: trial\nmodel: !!python/object:os.system {}\n")
    assert "expected sections and keys" in message(tmp_path, "- name\n")


def test_a_key_given_twice_is_an_error(tmp_path):
    shown = message(tmp_path, VALID + "seed: 1\nevaluate: {num_beams: 1, num_beams: 4}\nseed: 2\n")
    assert "seed (line 6): given twice, in lines 4 and 6" in shown
    assert "evaluate.num_beams (line 5): given twice, in lines 5 and 5" in shown


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "tiny.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"tinny\.yaml: no such config file\. .* has tiny\.yaml"):
        load_config(tmp_path / "tinny.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-3", 0.003), ("1E5", 1e5), ("+2e1", 20.0), ("1.", 1.0), (".5", 0.5), ("2", 2.0), ("-1e0", None)],
)
def test_numbers_as_people_write_them(tmp_path, text, value):
    file = write(tmp_path, VALID + f"distill: {{learning_rate: {text}}}\n")
    if value is None:
        with pytest.raises(ConfigError, match=r"got -1\.0"):
            load_config(file)
    else:
        assert load_config(file).distill.learning_rate == value


def test_whole_numbers_may_be_written_with_an_exponent(tmp_path):
    assert load_config(write(tmp_path, VALID), ["data.max_length_tokens=1e3"]).data.max_length_tokens == 1000


def test_overrides_make_sections_and_reach_free_mappings(tmp_path):
    config = load_config(
        write(tmp_path, VALID),
        [
            "finetune.lora.target_modules=[q_proj, v_proj]",
            "model.feature_map_options.init_scale=0.5",
            "engine.zero_stage=2",
            "variants.soft.overrides.model.attention=softmax",
            "data.prompt_template=Sum up: {dialogue}",
        ],
    )
    assert config.finetune.lora.target_modules == ("q_proj", "v_proj")
    assert config.model.feature_map_options == {"init_scale": 0.5}
    assert config.engine.zero_stage == 2
    assert apply_variant(config, "soft").model.attention == "softmax"
    assert config.data.prompt_template == "Sum up: {dialogue}"


def test_a_text_field_takes_an_override_literally(tmp_path):
    overrides = ["model.revision=0123", "name=2024-01-02", "distill.layers=3", "label=", "data.id_field=yes"]
    config = load_config(write(tmp_path, VALID + "label: x\n"), overrides)
    assert (config.model.revision, config.name, config.distill.layers) == ("0123", "2024-01-02", "3")
    assert config.label is None
    assert config.data.id_field == "yes"


def test_an_override_removes_a_variant(tmp_path):
    text = VALID + "variants: {one: {}, two: {}}\n"
    assert list(load_config(write(tmp_path, text), ["variants.one="]).variants) == ["two"]


@pytest.mark.parametrize("override", ["epochs", "=3", "distill.=3", "distill..epochs=3"])
def test_an_override_without_key_or_value_is_refused(tmp_path, override):
    assert "write section.key=value" in message(tmp_path, VALID, override)


def test_an_override_below_a_value_is_refused(tmp_path):
    assert "seed is a value, not a section" in message(tmp_path, VALID + "seed: 3\n", "seed.x=3")


def test_an_empty_section_means_its_defaults(tmp_path):
    assert load_config(write(tmp_path, VALID + "finetune:\nvariants:\n")) == load_config(write(tmp_path, VALID))


def test_home_and_the_deepspeed_file_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = VALID.replace("some/llama", "~/llama") + "engine: {deepspeed_config: ds.json}\n"
    config = load_config(write(tmp_path, text))
    assert config.model.base == "/home/somebody/llama"
    assert config.engine.deepspeed_config == str(tmp_path / "ds.json")
    assert load_config(tmp_path / "config.yaml", ["engine.deepspeed_config=b.json"]).engine.deepspeed_config == "b.json"


VARIANTS = """\
finetune: {learning_rate: 1e-4, lora: {alpha: 32}}
variants:
  dotted: {label: Dotted, overrides: {model.feature_map: relu, distill.enabled: false, finetune.lora.rank: 2}}
  nested: {overrides: {model: {feature_map: relu}, distill: {enabled: false}, finetune: {lora: {rank: 2}}}}
"""


def test_dotted_and_nested_variants_are_the_same(tmp_path):
    config = load_config(write(tmp_path, VALID + VARIANTS))
    dotted, nested = variant_configs(config).values()
    assert (dotted.label, nested.label) == ("Dotted", "nested")
    assert dotted.model_copy(update={"label": None}) == nested.model_copy(update={"label": None})
    assert dotted.finetune.lora.rank == 2
    assert dotted.finetune.lora.alpha == 32, "what is not overridden stays the main config's"
    assert config.finetune.lora.rank == 8
    assert dotted.variants == {}


def test_an_unknown_variant_brings_the_known_ones(tmp_path):
    config = load_config(write(tmp_path, VALID + VARIANTS))
    with pytest.raises(ConfigError, match=r"\(did you mean dotted\?\)\. The config has: dotted, nested"):
        apply_variant(config, "doted")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.max_length_tokens: 12", "a variant may differ in model, distill, finetune only"),
        ("modle.attention: softmax", "unknown key; did you mean model?"),
        ("model.base: other", "all variants share the base model"),
        ("model: {base: other}", "all variants share the base model"),
        ("model.attention: softmx", 'expected one of linear, softmax, got "softmx"'),
        ("finetune.micro_batch_size: 3", "8 is not a multiple of micro_batch_size 3"),
    ],
)
def test_a_variants_mistakes_are_told_when_loading(tmp_path, override, expected):
    shown = message(tmp_path, VALID + f"variants: {{one: {{overrides: {{{override}}}}}}}\n")
    assert "variants.one.overrides." in shown
    assert expected in shown


@pytest.mark.parametrize("name", ["main", "distill", "a/b", ".."])
def test_a_variants_name_is_a_folder_of_its_own(tmp_path, name):
    assert "a variant's name is" in message(tmp_path, VALID + f"variants: {{{name}: {{}}}}\n")


def test_the_resolved_yaml_gives_the_same_config(tmp_path):
    text = VALID + VARIANTS + "distill: {layers: '0,2-3', learning_rate: 3e-7}\nlabel: 'é: \"x\"'\n"
    config = load_config(
        write(tmp_path, text), ["data.prompt_template=A\n{dialogue}\n---\n", "name=123", "export.push_to_hub='a/b'"]
    )
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(config), encoding="utf-8")
    assert load_config(resolved) == config
    assert config.data.prompt_template == "A\n{dialogue}\n---\n"
    assert config.export.push_to_hub == "a/b"
    assert yaml.safe_load(resolved.read_text(encoding="utf-8"))["distill"]["learning_rate"] == 3e-7


def test_flat_keys_and_differences(tmp_path):
    old = load_config(write(tmp_path, VALID), ["variants.one.overrides.model.attention=softmax"])
    new = load_config(
        tmp_path / "config.yaml", ["distill.learning_rate=3e-2", "model.feature_map_options.init_scale=2"]
    )
    flat = flatten(old)
    assert flat["finetune.lora.rank"] == 8
    assert flat["model.feature_map_options"] == {}
    assert flat["variants.one.overrides"] == {"model": {"attention": "softmax"}}
    assert config_differences(old, old) == []
    assert config_differences(flat, new) == [
        'model.feature_map_options: {} → {"init_scale": 2}',
        "distill.learning_rate: 0.001 → 0.03",
        "variants.one.label: null → (not set)",
        'variants.one.overrides: {"model": {"attention": "softmax"}} → (not set)',
        "variants: (not set) → {}",
    ]


def test_loading_a_config_imports_no_torch():
    code = "import sys, hedgehog.pipeline.config_loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_came_later_is_no_difference_to_runs_from_before():
    """A run that was begun without `tiny.architecture`, and with LoRA's modules spelt out, goes on."""
    now = flatten(RunConfig.model_validate({"name": "x", "tiny": {}}))
    later = {"tiny.architecture", "data.kind", "data.second_text_field", "data.label_field"}
    later |= {"data.validation_split", "data.test_split"}
    before = {key: value for key, value in now.items() if key not in later}
    before["finetune.lora.target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert canonical(now) == canonical(before) and config_differences(before, now) == []
    gpt2 = flatten(RunConfig.model_validate({"name": "x", "tiny": {"architecture": "gpt2"}}))
    assert canonical(gpt2)["tiny.architecture"] == "gpt2"
    assert config_differences(before, gpt2) == ['tiny.architecture: (not set) → "gpt2"']
    spelt_out = {**gpt2, "finetune.lora.target_modules": ["c_attn", "attn.c_proj"]}
    assert config_differences(gpt2, spelt_out) == [], "null, for a GPT-2"
    less = {**now, "finetune.lora.target_modules": ["q_proj"]}
    assert config_differences(now, less) == ['finetune.lora.target_modules: null → ["q_proj"]']
    assert config_differences(now, {**now, "data.kind": "text"}) == ['data.kind: "dialogues" → "text"']
