"""`status` shows each stage's state and the command that goes on."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.config_loading import dump_resolved, load_config
from hedgehog.pipeline.data.batches import BatchPlan
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError, ConfigError
from hedgehog.pipeline.manifest import Artifact, Manifest
from hedgehog.pipeline.stage_progress import last_sign
from hedgehog.pipeline.status import find_run_folder, read_status
from hedgehog.pipeline.status_report import print_status


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a variant, before its first stage."""
    monkeypatch.chdir(tmp_path)
    config = RunConfig.model_validate(
        {
            "name": "trial",
            "model": {"base": "a/b"},
            "data": {"dataset": "c/d"},
            "distill": {"epochs": 2},
            "variants": {"soft": {"overrides": {"model.attention": "softmax"}}},
        }
    )
    folder = Path("runs/trial")
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").write_text(dump_resolved(config))
    return folder


def add_stage(run: Path, place: str, *, records: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
    folder = run / place
    folder.mkdir(parents=True)
    stage = next(name for name in reversed(place.split("/")) if not name.startswith("layers-"))
    Manifest(stage=stage, fingerprint="f", config={}, **{"status": "done", **fields}).write(folder)
    if records is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def prepared(run: Path, num_rows: int, lengths: Sequence[int] = ()) -> None:
    """`prepare` finished, with files of so many rows' tokens: a safetensors header and offsets, what is read."""
    splits = {
        f"tokens_{split}": Artifact(path=f"{split}.tokens", sha256="", num_bytes=0) for split in ("train", "test")
    }
    folder = add_stage(run, "prepare", artifacts=splits, duration_s=30.0)
    offsets = [0, *itertools.accumulate(lengths or [1] * num_rows)]
    # behind other tensors, as in a real file
    shape = {"offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [16, 16 + 8 * len(offsets)]}}
    header = json.dumps(shape).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(16) + struct.pack(f"<{len(offsets)}q", *offsets)
    for tokens in splits.values():
        (folder / tokens.path).write_bytes(content)


def with_config(run: Path, **sections: Any) -> None:
    """The run's config with other values."""
    config = load_config(run / "config.resolved.yaml").model_dump()
    for name, changes in sections.items():
        config[name] |= changes
    (run / "config.resolved.yaml").write_text(dump_resolved(RunConfig.model_validate(config)))


def states(run: Path) -> dict[str, str]:
    return {stage.title: stage.state for stage in read_status(str(run)).stages}


def test_a_run_before_its_first_stage(run):
    assert states(run) == dict.fromkeys(
        ["prepare", "distill", "finetune", "soft/distill", "soft/finetune", "evaluate", "export"], "not started"
    )
    assert read_status("trial").commands == ("hedgehog run runs/trial/config.resolved.yaml",)


def test_an_unfinished_stage_shows_how_far_it_is(run):
    prepared(run, num_rows=20)
    records = [{"step": step, "loss_nats": 3.0 / step, "step_s": 60.0} for step in (1, 2, 3)]
    folder = add_stage(run, "distill", status="running", records=records)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    before = time.time() - 600
    for file in folder.iterdir():
        os.utime(file, (before, before))
    stage = read_status(str(run)).stages[1]
    # 20 rows, 2 epochs, batches of 8
    assert (stage.state, stage.step, stage.total_steps) == ("unfinished", 3, 5)
    assert (stage.loss_name, stage.loss, stage.minutes) == ("loss_nats", 1.0, 3.0)
    assert stage.detail == "last wrote 10 min ago"


def test_a_record_whose_step_is_no_number_counts_for_none(run):
    records = [{"step": 2, "loss_nats": 3.0, "step_s": 60.0}, {"step": None}, {"step": "x"}, {"step": [3]}]
    add_stage(run, "distill", status="running", records=records)
    assert read_status(str(run)).stages[1].step == 2


def test_packed_rows_are_counted_as_training_packs_them(run):
    drawn = random.Random(0)
    lengths = [drawn.randint(5, 60) for _ in range(101)]
    with_config(run, distill={"packing": True}, data={"max_length_tokens": 64})
    prepared(run, num_rows=101, lengths=lengths)
    records = [{"step": step, "loss_nats": 3.0, "step_s": 2.0} for step in (1, 2, 3)]
    add_stage(run, "distill", status="running", records=records)
    stage = read_status(str(run)).stages[1]
    config = load_config(run / "config.resolved.yaml")
    split = TokenizedSplit.from_rows([([0], [1] * (length - 1)) for length in lengths])
    world = SimpleNamespace(rank=0, world_size=1)
    plan = BatchPlan(split, config.distill, 64, pad_id=0, seed=0, world=world)
    assert len(plan.sequences) < 101
    assert (stage.total_steps, stage.eta_s) == (plan.num_steps, 2.0 * (plan.num_steps - 3))


def test_how_long_an_evaluation_will_take(run):
    """20 rows in batches of 8 for two variants: 40 summaries, 24 in a shard's first and third batches of both."""
    with_config(run, evaluate={"batch_size": 8})
    prepared(run, num_rows=20)
    generated = [{"step": step, "new_tokens_per_summary": 9.0, "step_s": 10.0} for step in (1, 2, 3)]
    measured = {"step": 4, "loss_nats": 2.0, "step_s": 1.0}
    for place in ("evaluate", "evaluate/shard-0-of-2"):
        folder = run / place
        for kind, num_rows in (("predictions", 20), ("reference_losses", 8)):
            (folder / kind).mkdir(parents=True)
            for file, count in (("main.jsonl", num_rows - 4), ("main.rank1.jsonl", 4)):
                (folder / kind / file).write_text('{"index": 0}\n' * count + '{"ind')
        Manifest(stage="evaluate", fingerprint="f", config={}, world_size=2).write(folder)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (*generated, measured)))
    stages = {stage.title: stage for stage in read_status(str(run)).stages}
    whole, shard = stages["evaluate"], stages["evaluate 0/2"]
    # two processes share the batches: 20 / 8 of 10 s, then 32 / 8 of 1 s
    assert (whole.step, whole.total_steps, whole.eta_s) == (20, 40, (20 / 8 * 10 + 32 / 8) / 2)
    assert (shard.step, shard.total_steps, shard.eta_s) == (20, 24, (4 / 8 * 10 + 16 / 8) / 2)


def test_how_long_rows_to_classify_will_take(run):
    """20 rows in batches of 8 for two variants; every batch is one forward pass."""
    with_config(run, data={"kind": "classification", "dataset": "some/rows"}, evaluate={"batch_size": 8})
    prepared(run, num_rows=20)
    folder = run / "evaluate"
    (folder / "predictions").mkdir(parents=True)
    (folder / "predictions" / "main.jsonl").write_text('{"index": 0}\n' * 8 + '{"ind')
    Manifest(stage="evaluate", fingerprint="f", config={}, world_size=2).write(folder)
    record = {"step": 1, "loss_nats": 0.5, "accuracy_percent": 87.5, "step_s": 3.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    stage = {stage.title: stage for stage in read_status(str(run)).stages}["evaluate"]
    assert (stage.step, stage.total_steps, stage.eta_s) == (8, 40, 32 / 8 * 3 / 2)
    assert stage.loss is None, "of some rows of some variant"


def test_a_live_stage_renames_files_while_it_is_looked_at(run, monkeypatch):
    """Whatever is listed may be gone when it is opened, at every moment."""
    add_stage(run, "distill", status="running", records=[{"step": 1, "loss_nats": 3.0, "step_s": 2.0}])
    listed, is_file = Path.iterdir, Path.is_file
    gone = [Path("manifest.json.x.partial"), Path("checkpoints/step-000001.partial")]
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([*(self / name for name in gone), *listed(self)]))
    assert read_status(str(run)).stages[1].detail == "wrote just now"
    for vanishing in ("manifest.json", "metrics.jsonl"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_file", lambda self, name=vanishing: self.name == name or is_file(self))
            (run / "distill" / vanishing).unlink()
            read_status(str(run))
    shutil.rmtree(run / "distill")
    assert last_sign(run / "distill") == ""


def test_done_and_skipped_stages(run):
    artifact = Artifact(path="adapter", sha256="", num_bytes=1)
    add_stage(
        run, "finetune", artifacts={"adapter": artifact}, duration_s=90.0, records=[{"step": 4, "loss_nats": 2.0}]
    )
    add_stage(run, "variants/soft/distill", skipped="softmax has no maps")
    stages = {stage.title: stage for stage in read_status(str(run)).stages}
    done, skipped = stages["finetune"], stages["soft/distill"]
    assert (done.state, done.step, done.total_steps, done.minutes) == ("done", 4, 4, 1.5)
    assert done.artifacts == {"adapter": "runs/trial/finetune/adapter"}
    assert (skipped.state, skipped.detail) == ("skipped", "softmax has no maps")


def test_a_finished_stage_shows_the_tables_figures_not_its_last_batchs(run, capsys):
    records = [{"step": 4, "loss_nats": 2.0, "kl_nats": 0.9, "validation_kl_nats": 0.12345}]
    add_stage(run, "distill", summary={"kl_mean": 0.12345}, records=records)
    add_stage(run, "finetune", summary={"validation_loss": 0.81237}, records=[{"step": 4, "loss_nats": 2.0}])
    scores = {"main": {"loss_nats_per_token": 0.79243}, "soft": {"loss_nats_per_token": 0.5}}
    add_stage(run, "evaluate", summary={"variants": scores}, records=[{"step": 4, "loss_nats": 2.0}])
    add_stage(run, "variants/soft/finetune", status="running", records=[{"step": 3, "loss_nats": 2.5}])
    stages = {stage.title: stage for stage in read_status(str(run)).stages}
    assert (stages["distill"].loss_name, stages["distill"].loss) == ("validation_kl_nats", 0.12345)
    assert (stages["soft/finetune"].loss_name, stages["soft/finetune"].loss) == ("loss_nats", 2.5)
    print_status(str(run), as_json=False, verbose=True)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for stage, shown in (
        ("distill", "KL 0.1235"),
        ("finetune", "valid. 0.8124"),
        ("evaluate", "test 0.7924"),
        ("soft/finetune", "step 2.5"),
    ):
        assert shown in rows[stage]


def test_what_a_stage_failed_with_is_shown(run, capsys):
    add_stage(run, "prepare", status="running", error="data.dataset: c/d could not be fetched\nGive local files.")
    print_status(str(run), as_json=False)
    shown = capsys.readouterr().out
    assert "prepare: data.dataset: c/d could not be fetched Give local files." in shown and "log:" not in shown
    assert "to go on: hedgehog run" in shown


def test_a_finished_run_needs_no_command(run, capsys):
    for place in ("prepare", "distill", "finetune", "evaluate", "export"):
        add_stage(run, place)
    for place in ("distill", "finetune"):
        add_stage(run, f"variants/soft/{place}")
    assert read_status(str(run)).commands == ()
    print_status(str(run), as_json=False)
    assert "finished." in capsys.readouterr().out


def test_subsets_of_layers_are_finished_and_merged_before_the_rest(run):
    add_stage(run, "distill/layers-0-1")
    add_stage(run, "distill/layers-2-3", status="running")
    config = "runs/trial/config.resolved.yaml"
    assert states(run)["distill/2-3"] == "unfinished"
    assert read_status(str(run)).commands == (
        f"hedgehog distill {config} --layers 2-3",
        f"hedgehog merge {config}",
        f"hedgehog run {config}",
    )


def test_elements_tell_what_a_trained_layer_costs(run, capsys):
    """A step took 0.1 s for each layer run, and 0.25 s for each one trained; the first steps compile."""
    for layers, steps in (("0-1", 30), ("2", 25), ("3", 25)):
        first, _, last = layers.partition("-")
        num_run = int(last or first) + 1
        step_s = 0.1 * num_run + 0.25 * (num_run - int(first))
        records = [{"step": n, "loss_nats": 1.0, "step_s": step_s * (40 if n < 3 else 1)} for n in range(1, steps)]
        add_stage(run, f"distill/layers-{layers}", status="running", records=records)
    print_status(str(run), as_json=False)
    assert "took 2.5 times as long as running it; for a next run's groups: slurm.trained_layer_cost=2.5" in (
        capsys.readouterr().out
    )
    with_config(run, distill={"cache_hidden_states": True})
    assert read_status(str(run)).trained_layer_cost is None


def test_a_run_folder_that_was_moved(run):
    run.rename("elsewhere")
    assert read_status("elsewhere").commands == (
        "hedgehog run elsewhere/config.resolved.yaml output_dir=. name=elsewhere",
    )


def test_the_ways_to_name_a_run(run):
    assert find_run_folder("trial") == find_run_folder("runs/trial") == run
    assert find_run_folder("runs/trial/config.resolved.yaml") == run
    with pytest.raises(ConfigError, match=r"trail: no run folder .* Runs here: trial\."):
        find_run_folder("trail")


def test_files_that_are_not_ours(run):
    (run / "distill").mkdir()
    (run / "distill" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"distill/manifest\.json"):
        read_status(str(run))
    (run / "config.resolved.yaml").write_text("nam: x\n")
    with pytest.raises(CheckpointError, match="did you mean name"):
        read_status(str(run))


def test_json_and_the_table_say_the_same(run, capsys):
    add_stage(run, "prepare")
    print_status(str(run), as_json=True)
    parsed = json.loads(capsys.readouterr().out)
    assert [stage["state"] for stage in parsed["stages"]][:2] == ["done", "not started"]
    print_status(str(run), as_json=False)
    shown = capsys.readouterr().out
    assert "to go on: hedgehog run runs/trial/config.resolved.yaml" in shown
    assert "soft" in shown
    print_status(str(run), as_json=False, verbose=True)
    assert "soft/finetune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variants", "shown"),
    [
        ({"main": {"accuracy": 91.0, "loss_nats_per_row": 0.31239}}, "test 0.3124"),
        ({"main": {"loss_nats_per_row": None}}, None),
        ({"main": []}, None),
        ([], None),
    ],
)
def test_rows_to_classify_have_a_loss_a_row(run, variants, shown, capsys):
    add_stage(run, "evaluate", summary={"variants": variants})
    print_status(str(run), as_json=False, verbose=True)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate"))
    assert ("test" in line) == (shown is not None) and (shown or "") in line
