"""kill -9 or a signal at a random moment of every stage, the same command again: the same losses and artifacts."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hedgehog.pipeline.manifest import Manifest, read_manifest

MICRO = {
    "name": "micro",
    "model": {"feature_map": "hedgehog_softmax"},
    "tiny": {
        "num_train_dialogues": 64, "num_validation_dialogues": 8, "num_test_dialogues": 8, "vocab_size": 400,
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
        "pretrain_steps": 12, "pretrain_batch_size": 4,
    },
    "data": {"max_length_tokens": 256},
    "distill": {"max_steps": 6, "global_batch_size": 2, "save_every_steps": 2},
    "finetune": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "save_every_steps": 2},
    "evaluate": {"batch_size": 3, "max_new_tokens": 6, "bootstrap_samples": 20},
    "export": {"dtype": "float32"},
    "engine": {"precision": "float32", "device": "cpu"},
    "variants": {"softmax": {"label": "softmax + LoRA", "overrides": {"model.attention": "softmax"}}},
}  # fmt: skip
IN_ORDER = ("prepare", "distill", "finetune", "variants/softmax/finetune", "evaluate", "export")
"""The stages of this config that do something, as a run works through them."""
TIMES = {"step_s", "memory_bytes", "tokens_per_s", "elapsed_s"}


@pytest.fixture(scope="module")
def fork_runs(run_forked: Callable[..., tuple[int, str]]) -> Callable[..., list]:
    """`fork_runs(config, output_dir, signals)`: what tests/fork_runs.py reports of each."""

    def run(config: Path, output_dir: Path, signals: list) -> list:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        arguments = [str(config), str(output_dir), json.dumps(signals)]
        status, said = run_forked(Path(__file__).with_name("fork_runs.py"), arguments, environment)
        assert status == 0, said[-8000:]
        return json.loads(said.splitlines()[-1])

    return run


def manifests(root: Path) -> dict[str, Manifest]:
    found = {}
    for file in sorted(root.rglob("manifest.json")):
        manifest = read_manifest(file.parent)
        assert manifest is not None and manifest.status == "done", file
        found[str(file.parent.relative_to(root))] = manifest
    return found


def losses(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def results(root: Path) -> dict[str, bytes]:
    """Weights, tokens, predictions, scores, the drift report and all of the export, but for times and sizes."""
    kept = (".safetensors", ".jsonl", ".model")
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
        and (file.suffix in kept or file.name in ("rouge.json", "drift.json") or "model" in file.parts)
        and "checkpoints" not in file.parts
        and file.name not in ("metrics.jsonl", "README.md")  # a model card tells minutes and memory
    }


@pytest.fixture(scope="module")
def seed() -> int:
    seed = int(os.environ.get("HEDGEHOG_KILL_SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"seed {seed}: HEDGEHOG_KILL_SEED={seed} repeats the moments of the kills and signals")
    return seed


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "micro.yaml"
    file.write_text(yaml.safe_dump(MICRO))
    return file


@pytest.fixture(scope="module")
def undisturbed(fork_runs: Callable[..., list], config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    fork_runs(config_file, output_dir, [])
    root = output_dir / "micro"
    assert {stage for stage, manifest in manifests(root).items() if manifest.skipped is None} == set(IN_ORDER)
    return root


def assert_equal_runs(actual: Path, expected: Path) -> None:
    assert manifests(actual).keys() == manifests(expected).keys()
    for stage in manifests(expected):
        assert losses(actual / stage) == losses(expected / stage), stage
    expected_files, actual_files = results(expected), results(actual)
    assert {"evaluate/rouge.json", "export/drift.json", "export/model/model.safetensors"} <= expected_files.keys()
    assert actual_files.keys() == expected_files.keys()
    different = [name for name in expected_files if actual_files[name] != expected_files[name]]
    assert different == []
    leftovers = [str(path.relative_to(actual)) for path in actual.rglob("*.partial*")]
    assert leftovers == []


@pytest.mark.slow
def test_a_kill_in_every_stage_changes_nothing(
    fork_runs: Callable[..., list], config_file: Path, undisturbed: Path, seed: int, tmp_path: Path
) -> None:
    """One random moment of every stage; with HEDGEHOG_KILLS=5 five of each, the later ones of what is left of it."""
    moments = random.Random(seed)
    ran = manifests(undisturbed)
    kills = [
        [stage, round(moments.uniform(0, 0.4 * ran[stage].duration_s), 3), ["SIGKILL"]]
        for stage in IN_ORDER
        for _ in range(int(os.environ.get("HEDGEHOG_KILLS", "1")))
    ]
    killed = fork_runs(config_file, tmp_path, kills)
    print(killed)
    assert len(killed) == len(kills)
    assert {stage for stage, _, status, _, undone in killed if status == -signal.SIGKILL and undone} == set(IN_ORDER)
    assert_equal_runs(tmp_path / "micro", undisturbed)


@pytest.mark.slow
def test_signals_in_every_stage_change_nothing(
    fork_runs: Callable[..., list], config_file: Path, undisturbed: Path, seed: int, tmp_path: Path
) -> None:
    """Two moments of every stage: its beginning, and some time within. Some come twice, or with TERM after them."""
    moments = random.Random(seed)
    signals = []
    ran = manifests(undisturbed)
    for stage in IN_ORDER:
        names = moments.choice([["SIGUSR2"], ["SIGTERM"], ["SIGUSR2", "SIGUSR2"], ["SIGUSR2", "SIGTERM"]])
        within_s = moments.uniform(0, 0.8 * ran[stage].duration_s)
        signals += [[stage, 0.0, names], [stage, round(within_s, 3), names]]
    stopped = fork_runs(config_file, tmp_path, signals)
    print(stopped)
    ended = [status for _, _, status, _, _ in stopped]
    assert len(ended) == len(signals) and set(ended) <= {0, 75}
    assert ended.count(75) >= len(signals) // 2, "most of them came in time"
    assert_equal_runs(tmp_path / "micro", undisturbed)
