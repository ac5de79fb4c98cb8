"""export on tiny random models: the clean reload for real once, everything else with the reload done in place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from hedgehog.pipeline import drift, export_folder
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.drift import Probe, answer_probe
from hedgehog.pipeline.errors import CheckpointError, Interrupted, ModelError, ResourceError
from hedgehog.pipeline.manifest import describe_artifact
from hedgehog.pipeline.runner import run_stage
from hedgehog.stages import export


def folder(config: RunConfig, variant: str | None = None) -> Path:
    root = Path(config.output_dir) / config.name
    return (root if variant is None else root / "variants" / variant) / "export"


def exporting(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"export": config.export.model_copy(update=changes)})


def tensors_of(model_folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(model_folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def reload_in_place(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The reload in this process: quick, and proves nothing about the project's absence. Returns the models."""
    models: list[Any] = []

    def answer(model_folder: Path, probe: Probe, *, device: torch.device, trust_remote_code: bool) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype="auto", trust_remote_code=trust_remote_code
        ).eval()
        models.append(model)
        facts = {
            "dtype": str(model.dtype),
            "model_class": type(model).__name__,
            "encoded_with_special_tokens": probe.prompt_tokens,
        }
        return answer_probe(model, probe, eos_id=2, pad_id=0), facts

    monkeypatch.setattr(export, "answer_in_clean_process", answer)
    return models


def test_plain_transformers_loads_the_export_without_the_project(
    copied_run: RunConfig, capsys: pytest.CaptureFixture[str]
):
    run_stage(copied_run, "evaluate")
    config = exporting(copied_run, dtype="float32", max_logit_drift=1e-3)
    capsys.readouterr()
    manifest = run_stage(config, "export")
    assert capsys.readouterr().out.count("linear attention: torch (no compiled kernel for cpu") == 1
    drift = json.loads((folder(config) / "drift.json").read_text())
    assert drift["logits_max_abs"] < 1e-3 and drift["kl_max_nats"] < 1e-6
    assert drift["equal_argmax_share"] == drift["equal_generated_share"] == 1.0
    assert drift["num_generated_tokens"] == 4 * 32
    assert drift["exported"] == {"dtype": "float32", "model_class": "HedgehogLlamaForCausalLM"}
    assert set(manifest.artifacts) == {"model", "drift"}

    model = folder(config) / "model"
    card = (model / "README.md").read_text()
    report = json.loads((Path(config.output_dir) / "run" / "evaluate" / "rouge.json").read_text())
    assert f"{report['variants']['main']['all']['loss_nats_per_token']['value']:.4f}" in card
    assert "softmax + LoRA" in card and "tokenizer.bos_token + prompt" in card
    generation = json.loads((model / "generation_config.json").read_text())
    wanted = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": True}
    assert {key: generation.get(key) for key in wanted} == wanted
    assert not list(folder(config).glob("*.partial"))
    assert (model / "model.safetensors").stat().st_mode & 0o044 == model.stat().st_mode & 0o044
    _the_cards_example_runs(card, model)


def _the_cards_example_runs(card: str, model: Path) -> None:
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(model)!r}")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.5), ("float16", 0.1)])
def test_weights_have_the_dtype_asked_for_and_maps_float32(
    dtype: str, limit: float, copied_run: RunConfig, reload_in_place: list[Any]
):
    config = exporting(copied_run, dtype=dtype, max_logit_drift=limit)
    run_stage(config, "export")
    for name, tensor in tensors_of(folder(config) / "model").items():
        assert tensor.dtype == (torch.float32 if "feature_map" in name else getattr(torch, dtype)), name
    assert json.loads((folder(config) / "model" / "config.json").read_text())["dtype"] == dtype
    card = (folder(config) / "model" / "README.md").read_text()
    assert "had not been scored" in card and dtype in card


def test_shards_hold_every_tensor_once(copied_run: RunConfig, reload_in_place: list[Any]):
    config = exporting(copied_run, dtype="float32", max_shard_size="30KB", max_logit_drift=1e-3)
    manifest = run_stage(config, "export")
    model = folder(config) / "model"
    files = sorted(file.name for file in model.glob("*.safetensors"))
    assert len(files) == manifest.summary["num_shards"] >= 4
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(tensors_of(model)) == set(reload_in_place[0].state_dict())
    assert all((model / file).stat().st_size < 45_000 for file in files)


def test_a_softmax_variant_becomes_a_plain_llama(copied_run: RunConfig, reload_in_place: list[Any]):
    config = exporting(copied_run, dtype="float32", max_logit_drift=1e-3)
    run_stage(config, "export", variant="softmax")
    model = folder(config, "softmax") / "model"
    assert type(reload_in_place[0]).__name__ == "LlamaForCausalLM"
    assert not list(model.glob("*.py"))
    assert "auto_map" not in json.loads((model / "config.json").read_text())
    assert "A plain Llama." in (model / "README.md").read_text()


@pytest.mark.parametrize(
    ("llama", "model"),
    [
        ({"num_key_value_heads": 1, "tie_word_embeddings": True}, {"feature_map": "performer"}),
        ({"num_key_value_heads": 4}, {"quantization": "nf4"}),
    ],
    ids=["one-kv-head-tied-performer", "nf4"],
)
def test_other_models(
    llama: dict[str, Any],
    model: dict[str, Any],
    make_finished_run: Callable[..., RunConfig],
    reload_in_place: list[Any],
):
    config = make_finished_run(llama=llama, model=model, export={"dtype": "float32", "max_logit_drift": 2e-3})
    run_stage(config, "export")
    written = json.loads((folder(config) / "model" / "config.json").read_text())
    assert written["tie_word_embeddings"] == llama.get("tie_word_embeddings", False)
    assert "quantization_config" not in written
    assert ("lm_head.weight" in tensors_of(folder(config) / "model")) != written["tie_word_embeddings"]
    assert ("dequantized" in (folder(config) / "model" / "README.md").read_text()) == ("quantization" in model)


def test_too_much_drift_fails_and_leaves_no_model(copied_run: RunConfig, reload_in_place: list[Any]):
    config = exporting(copied_run, dtype="bfloat16", max_logit_drift=1e-4)
    with pytest.raises(ModelError, match=r"more than export.max_logit_drift=0.0001"):
        run_stage(config, "export")
    assert json.loads((folder(config) / "drift.json").read_text())["logits_max_abs"] > 1e-4
    assert sorted(file.name for file in folder(config).iterdir()) == ["drift.json", "lease", "manifest.json"]
    wider = exporting(copied_run, dtype="float32", max_logit_drift=1e-3)  # the cure it names, without --force
    assert run_stage(wider, "export").summary["drift"]["logits_max_abs"] < 1e-3


def test_a_full_disk_is_refused_before_anything_is_written(copied_run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(export_folder.shutil, "disk_usage", lambda _: usage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(ResourceError, match=r"the disk has only 1.0 MiB free.*Nothing was written"):
        run_stage(copied_run, "export")
    assert sorted(file.name for file in folder(copied_run).iterdir()) == ["lease", "manifest.json"]


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_export_leaves_nothing_that_looks_complete(
    copied_run: RunConfig, reload_in_place: list[Any], monkeypatch: pytest.MonkeyPatch
):

    def dies(*_: Any, **__: Any) -> None:
        # a real kill runs no clean-up: keep what atomic_directory would remove
        (unfinished,) = folder(copied_run).glob("model.*.partial")
        shutil.copytree(unfinished, folder(copied_run) / "kept")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_configs", dies)
        with pytest.raises(Killed):
            run_stage(copied_run, "export")
    assert not (folder(copied_run) / "model").exists()
    (folder(copied_run) / "kept").rename(folder(copied_run) / "model.1.partial")
    (folder(copied_run) / "model.1.partial" / "stale.txt").write_text("from the killed attempt")
    run_stage(copied_run, "export")
    assert not (folder(copied_run) / "model" / "stale.txt").exists()
    assert not list(folder(copied_run).glob("*.partial"))
    assert _padding_side(folder(copied_run) / "model") == "left"


@pytest.mark.parametrize("sent_to", ["the run", "both"])
def test_a_signal_ends_the_reload_too(copied_run: RunConfig, monkeypatch: pytest.MonkeyPatch, sent_to: str):
    popen = drift.subprocess.Popen

    def signalled(command: list[str], **options: Any) -> Any:
        process = popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        if sent_to == "both":
            process.send_signal(signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR2)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(drift.subprocess, "Popen", signalled)
        with pytest.raises(Interrupted, match="export stopped by SIGUSR2: the export was not compared yet"):
            run_stage(copied_run, "export")
    assert sorted(file.name for file in folder(copied_run).iterdir()) == ["lease", "manifest.json"]


def _padding_side(model: Path) -> str:
    return AutoTokenizer.from_pretrained(model, trust_remote_code=True).padding_side


def test_licence_files_of_the_base_travel_along(copied_run: RunConfig, reload_in_place: list[Any]):
    base = Path(copied_run.output_dir) / "base"
    manifest_file = Path(copied_run.output_dir) / "run" / "prepare" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    shutil.copytree(manifest["summary"]["base_model"], base)
    (base / "LICENSE.txt").write_text("terms")
    manifest["summary"]["base_model"] = str(base)
    manifest_file.write_text(json.dumps(manifest))
    config = copied_run.model_copy(update={"model": copied_run.model.model_copy(update={"base": str(base)})})
    run_stage(config, "export")
    assert (folder(config) / "model" / "LICENSE.txt").read_text() == "terms"
    card = (folder(config) / "model" / "README.md").read_text()
    assert "derive from base: its licence stays" in card and "`LICENSE.txt`" in card and str(base) not in card


def test_the_folder_is_pushed_when_asked_and_goes_on_after_a_refusal(
    copied_run: RunConfig, reload_in_place: list[Any], monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    uploads: list[tuple[str, list[str]]] = []
    reachable = False

    class FakeApi:
        failure: Exception

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            assert private and exist_ok
            if not reachable:
                raise self.failure
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
            uploads.append((repo_id, sorted(file.name for file in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    config = exporting(copied_run, push_to_hub="me/hedgehog")
    for failure, cure in (
        (ConnectionError("no network"), "see that this machine reaches the hub"),
        (huggingface_hub.errors.OfflineModeIsEnabled("no network"), "unset HF_HUB_OFFLINE"),
        (huggingface_hub.errors.HfHubHTTPError("no network", response=MagicMock()), "log in with `hf auth login`"),
    ):
        FakeApi.failure = failure
        with pytest.raises(ResourceError, match=rf"me/hedgehog \(no network\).*is complete: {cure}"):
            run_stage(config, "export")
    reachable = True
    manifest = run_stage(config, "export")
    assert len(reload_in_place) == 1  # the second attempt only uploaded
    assert manifest.summary["pushed_to"] == "https://hub/me/hedgehog"
    [(repository, files)] = uploads
    assert repository == "me/hedgehog" and {"README.md", "config.json", "model.safetensors"} <= set(files)
    run_stage(config, "export")
    assert len(uploads) == 1, "what is uploaded is done"
    run_stage(exporting(copied_run, push_to_hub="me/other"), "export")
    assert [repository for repository, _ in uploads] == ["me/hedgehog", "me/other"] and len(reload_in_place) == 1


def test_without_push_to_hub_nothing_is_uploaded(
    copied_run: RunConfig, reload_in_place: list[Any], monkeypatch: pytest.MonkeyPatch
):
    def never(*_: Any) -> None:
        raise AssertionError("uploaded without being asked")

    monkeypatch.setattr(export, "push_folder", never)
    assert "pushed_to" not in run_stage(copied_run, "export").summary


def test_the_card_of_a_finished_export_gets_the_scores_that_came_later(
    copied_run: RunConfig, reload_in_place: list[Any], monkeypatch: pytest.MonkeyPatch
):
    run_stage(copied_run, "export")
    card = folder(copied_run) / "model" / "README.md"
    assert "ROUGE" not in card.read_text()
    run_stage(copied_run, "evaluate")
    manifest = run_stage(copied_run, "export")
    assert "ROUGE" in card.read_text() and len(reload_in_place) == 1
    assert describe_artifact(folder(copied_run), "model").sha256 == manifest.artifacts["model"].sha256
    before = card.stat().st_mtime_ns
    run_stage(copied_run, "export")
    assert card.stat().st_mtime_ns == before


def test_a_base_that_changed_since_prepare_is_refused(copied_run: RunConfig):
    prepared = Path(copied_run.output_dir) / "run" / "prepare"
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["summary"]["base_fingerprint"] = "of other weights"
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"base model changed since prepare.*prepare CONFIG --force"):
        run_stage(copied_run, "export")
