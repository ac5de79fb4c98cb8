"""The runner with stages made of three lines: what is skipped, refused, resumed, begun anew."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hedgehog.pipeline import attempt, runner
from hedgehog.pipeline.config import FinetuneConfig, RunConfig, VariantConfig
from hedgehog.pipeline.errors import CheckpointError, ConfigError, DataError, Interrupted, LeaseError, ResourceError
from hedgehog.pipeline.interrupts import stop_if_asked
from hedgehog.pipeline.manifest import read_manifest
from hedgehog.pipeline.run_folder import RunFolder, atomic_write
from hedgehog.pipeline.runner import run_pipeline, run_stage
from hedgehog.pipeline.stage_context import StageContext, StageResult

CONSUMES = {
    "prepare": (),
    "distill": ("prepare",),
    "finetune": ("prepare", "distill"),
    "evaluate": ("prepare", "distill", "finetune"),
    "export": ("prepare", "distill", "finetune"),
}


class FakeStages:
    """Five stages that write one file each and remember in which order they ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failure: BaseException | None = None
        self.content = "1"

    def module(self, stage: str) -> ModuleType:
        module = ModuleType(f"fake_{stage}")

        def run(ctx: StageContext) -> StageResult:
            self.calls.append("/".join(filter(None, (ctx.variant, ctx.stage))))
            if self.failure is not None:
                raise self.failure
            for entry in ctx.inputs.values():
                entry.artifact("file")
            (ctx.folder / "out.txt").write_text(f"{ctx.stage} {self.content} {ctx.config.finetune.learning_rate}")
            return StageResult(artifacts={"file": "out.txt"}, summary={"rows": 3})

        module.__dict__.update(
            CONSUMES=CONSUMES[stage],
            SECTIONS=("seed", stage),
            IGNORED=frozenset({"finetune.log_every_steps"}),
            run=run,
        )
        return module


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStages]:
    fake = FakeStages()
    for stage in CONSUMES:
        monkeypatch.setitem(sys.modules, f"fake_{stage}", fake.module(stage))
        monkeypatch.setitem(attempt.STAGE_MODULES, stage, f"fake_{stage}")
    yield fake


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    variant = VariantConfig(overrides={"model.attention": "softmax"})
    return RunConfig(name="r", output_dir=str(tmp_path), variants={"softmax": variant})


def test_the_whole_pipeline_runs_each_conversion_then_scores_and_exports(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config)
    assert stages.calls == [
        "prepare", "distill", "finetune", "softmax/distill", "softmax/finetune", "evaluate", "export",
    ]  # fmt: skip
    root = Path(config.output_dir) / "r"
    assert (root / "variants" / "softmax" / "finetune" / "manifest.json").is_file()
    assert (root / "config.resolved.yaml").is_file()


@pytest.mark.parametrize(
    ("place", "kind", "expected"),
    [
        (3, None, ["finetune", "softmax/distill", "softmax/finetune", "count", "evaluate", "export"]),
        (
            2,
            "VARIANT_STAGES",
            ["count", "finetune", "softmax/distill", "softmax/count", "softmax/finetune", "evaluate"],
        ),
    ],
)
def test_a_stage_runs_where_the_table_has_it(
    stages: FakeStages, config: RunConfig, monkeypatch: pytest.MonkeyPatch, place: int, kind: str | None, expected: list
) -> None:
    """What CONTRIBUTING.md promises to whoever adds one."""
    monkeypatch.setitem(CONSUMES, "count", ("prepare",))
    monkeypatch.setitem(sys.modules, "fake_count", stages.module("count"))
    monkeypatch.setitem(attempt.STAGE_MODULES, "count", "fake_count")
    monkeypatch.setattr(runner, "STAGES", (*runner.STAGES[:place], "count", *runner.STAGES[place:]))
    if kind is not None:
        monkeypatch.setattr(runner, kind, (*getattr(runner, kind), "count"))
    run_pipeline(config)
    assert stages.calls[2 : 2 + len(expected)] == expected


def test_the_last_lines_are_commands_for_what_was_made(
    stages: FakeStages, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config.model_copy(update={"output_dir": f"{config.output_dir}/two words"})
    run_pipeline(config)
    told = {line[5:13].strip(): shlex.split(line[13:]) for line in capsys.readouterr().out.splitlines()[-5:]}
    assert told["try it"][:4] == ["hedgehog", "generate", f"{config.output_dir}/r", "--text"]
    assert told["show it"] == ["hedgehog", "report", f"{config.output_dir}/r"]
    assert " ".join(told["scores"]) == f"{config.output_dir}/r/evaluate/results.md"


def test_the_last_lines_of_a_run_that_classifies_generate_nothing(
    stages: FakeStages, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config.data.model_copy(update={"kind": "classification"})
    run_pipeline(config.model_copy(update={"data": data}))
    told = capsys.readouterr().out
    assert "load it  AutoModelForSequenceClassification.from_pretrained(" in told and "try it" not in told


def test_a_finished_run_does_nothing_and_says_so(
    stages: FakeStages, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(config)
    stages.calls.clear()
    capsys.readouterr()
    run_pipeline(config)
    assert stages.calls == []
    assert capsys.readouterr().out.count("nothing to do") == 7


def test_from_and_to_choose_a_range(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config, last="distill")
    assert stages.calls == ["prepare", "distill", "softmax/distill"]
    with pytest.raises(ConfigError, match="comes after"):
        run_pipeline(config, first="export", last="distill")
    with pytest.raises(ConfigError, match="unknown stage 'distil'"):
        run_pipeline(config, first="distil")


def test_an_unfinished_input_names_the_command_that_makes_it(stages: FakeStages, config: RunConfig) -> None:
    run_stage(config, "prepare")
    with pytest.raises(CheckpointError, match="hedgehog distill CONFIG"):
        run_stage(config, "finetune")
    with pytest.raises(CheckpointError, match="hedgehog distill CONFIG --variant softmax"):
        run_stage(config, "finetune", variant="softmax")


def test_a_changed_config_is_refused_with_the_difference_until_forced(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config)
    changed = config.model_copy(update={"finetune": FinetuneConfig(learning_rate=5e-4)})
    with pytest.raises(CheckpointError, match=r"finetune\.learning_rate"):
        run_stage(changed, "finetune")
    folder = Path(config.output_dir) / "r" / "finetune"
    assert (folder / "out.txt").read_text().endswith("0.001")
    run_stage(changed, "finetune", force=True)
    assert (folder / "out.txt").read_text().endswith("0.0005")
    assert (folder.with_name("finetune.previous") / "out.txt").read_text().endswith("0.001")


def test_force_after_a_kill_goes_on_and_never_removes_the_finished_folder(
    stages: FakeStages, config: RunConfig
) -> None:
    run_pipeline(config)
    folder = Path(config.output_dir) / "r" / "finetune"
    stages.failure = KeyboardInterrupt()
    changed = config.model_copy(update={"finetune": FinetuneConfig(learning_rate=5e-4)})
    with pytest.raises(KeyboardInterrupt):
        run_stage(changed, "finetune", force=True)
    (folder / "checkpoint").write_text("step 7")
    with pytest.raises(KeyboardInterrupt):
        run_stage(changed, "finetune", force=True)
    assert (folder / "checkpoint").read_text() == "step 7", "the same command goes on"
    again = config.model_copy(update={"finetune": FinetuneConfig(learning_rate=2e-4)})
    with pytest.raises(KeyboardInterrupt):
        run_stage(again, "finetune", force=True)
    assert not (folder / "checkpoint").exists()
    assert (folder.with_name("finetune.previous") / "out.txt").read_text().endswith("0.001")
    stages.failure = None
    assert run_stage(again, "finetune").status == "done"


def test_force_leaves_the_subsets_of_layers(stages: FakeStages, config: RunConfig) -> None:
    run_stage(config, "prepare")
    subset = config.model_copy(update={"distill": config.distill.model_copy(update={"layers": "0-1"})})
    run_stage(subset, "distill")
    run_stage(config, "distill")
    run_stage(config, "distill", force=True)
    folder = Path(config.output_dir) / "r" / "distill"
    assert (folder / "layers-0-1" / "out.txt").is_file()
    assert sorted(path.name for path in folder.with_name("distill.previous").iterdir()) == [
        "manifest.json", "out.txt",
    ]  # fmt: skip
    run_stage(subset, "distill", force=True)
    assert (folder / "layers-0-1.previous" / "out.txt").is_file()
    assert RunFolder(folder.parent).subsets() == [folder / "layers-0-1"]


def test_a_key_that_does_not_change_the_result_is_not_a_change(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config)
    stages.calls.clear()
    run_stage(config.model_copy(update={"finetune": FinetuneConfig(log_every_steps=50)}), "finetune")
    assert stages.calls == []


def test_a_softmax_baseline_does_not_depend_on_feature_maps(config: RunConfig) -> None:
    from hedgehog.stages import finetune

    softmax = config.model.model_copy(update={"attention": "softmax"})
    base = config.model_copy(update={"model": softmax})
    other = config.model_copy(update={"model": softmax.model_copy(update={"feature_map": "elu", "feature_dim": 7})})
    assert attempt.stage_sections(base, finetune) == attempt.stage_sections(other, finetune)
    linear = other.model_copy(update={"model": other.model.model_copy(update={"attention": "linear"})})
    assert attempt.stage_sections(config, finetune) != attempt.stage_sections(linear, finetune)


def test_a_changed_input_is_refused(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config)
    stages.content = "2"
    run_stage(config, "prepare", force=True)
    with pytest.raises(CheckpointError, match="input from prepare: its artifacts changed"):
        run_stage(config, "distill")


def test_an_equal_input_made_again_is_no_change(stages: FakeStages, config: RunConfig) -> None:
    run_pipeline(config)
    run_stage(config, "prepare", force=True)
    stages.calls.clear()
    run_stage(config, "distill")
    assert stages.calls == []


def test_a_killed_stage_goes_on_in_its_folder(stages: FakeStages, config: RunConfig) -> None:
    run_stage(config, "prepare")
    stages.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, "distill")
    folder = Path(config.output_dir) / "r" / "distill"
    (folder / "checkpoint").write_text("step 7")
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.status == "running"
    stages.failure = None
    manifest = run_stage(config, "distill")
    assert manifest.status == "done" and manifest.num_resumes == 1
    assert (folder / "checkpoint").read_text() == "step 7"
    assert manifest.summary == {"rows": 3}


def test_a_mistake_corrected_before_anything_was_made_needs_no_force(stages: FakeStages, config: RunConfig) -> None:
    stages.failure = ConfigError("no such base")
    with pytest.raises(ConfigError):
        run_stage(config, "prepare")
    stages.failure = None
    manifest = run_stage(config.model_copy(update={"seed": 1}), "prepare")
    assert manifest.status == "done" and manifest.num_resumes == 0


def test_a_changed_file_from_outside_is_refused(stages: FakeStages, config: RunConfig, tmp_path: Path) -> None:
    data = tmp_path / "train.json"
    data.write_text("[]")

    def external_inputs(config: RunConfig) -> dict[str, str]:
        return {f"data.train_file {data}": data.read_text()}

    sys.modules["fake_prepare"].external_inputs = external_inputs  # type: ignore[attr-defined]
    run_stage(config, "prepare")
    run_stage(config, "prepare")
    data.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"data\.train_file .*train\.json: the file changed"):
        run_stage(config, "prepare")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="takes a file system that makes no folders")
def test_a_place_where_no_folder_can_be_made(stages: FakeStages, config: RunConfig) -> None:
    with pytest.raises(ResourceError, match="no folder can be made in /proc: choose another output_dir"):
        run_pipeline(config.model_copy(update={"output_dir": "/proc/x"}))


def test_a_full_disk_is_one_message(stages: FakeStages, config: RunConfig) -> None:
    stages.failure = OSError(errno.ENOSPC, "No space left on device", "x")
    with pytest.raises(ResourceError, match="prepare: the disk is full"):
        run_stage(config, "prepare")


def test_variants_belong_to_the_training_stages(stages: FakeStages, config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="once for all variants"):
        run_stage(config, "prepare", variant="softmax")
    with pytest.raises(ConfigError, match="softmx"):
        run_stage(config, "distill", variant="softmx")


def test_named_generators_differ_by_name_and_repeat_by_seed(stages: FakeStages, config: RunConfig) -> None:
    drawn: list[tuple[int, ...]] = []

    def run(ctx: StageContext) -> StageResult:
        drawn.append(tuple(int(ctx.rng(name).initial_seed()) for name in ("order", "order", "dropout")))
        return StageResult()

    sys.modules["fake_prepare"].run = run  # type: ignore[attr-defined]
    run_stage(config, "prepare")
    (first, again, other) = drawn[0]
    assert first == again != other


def test_a_signal_between_two_stages_stops_the_next(stages: FakeStages, config: RunConfig) -> None:
    def run(ctx: StageContext) -> StageResult:
        os.kill(os.getpid(), signal.SIGTERM)
        return StageResult(artifacts={}, summary={"finished": "all the same"})

    sys.modules["fake_prepare"].run = run  # type: ignore[attr-defined]
    with pytest.raises(Interrupted, match="distill stopped by SIGTERM: this attempt had not begun") as raised:
        run_pipeline(config)
    assert (raised.value.exit_code, raised.value.requeue) == (75, False)
    root = Path(config.output_dir) / "r"
    manifest = read_manifest(root / "prepare")
    assert manifest is not None and manifest.status == "done"
    assert not (root / "distill").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_is_done_is_done_in_spite_of_a_signal(stages: FakeStages, config: RunConfig) -> None:
    run_stage(config, "prepare")

    def run(ctx: StageContext) -> StageResult:
        os.kill(os.getpid(), signal.SIGTERM)
        stop_if_asked("half of it")
        return StageResult()

    sys.modules["fake_distill"].run = run  # type: ignore[attr-defined]
    with pytest.raises(Interrupted, match="distill stopped by SIGTERM: half of it"):
        run_stage(config, "distill")
    manifest = read_manifest(Path(config.output_dir) / "r" / "distill")
    assert manifest is not None and manifest.interrupted is not None
    assert manifest.interrupted.endswith("SIGTERM, half of it")


@pytest.mark.parametrize(("error", "told"), [(DataError("no rows"), "no rows"), (OSError("odd"), "OSError: odd")])
def test_what_a_stage_failed_with_is_kept_until_it_is_tried_again(
    stages: FakeStages, config: RunConfig, error: Exception, told: str
) -> None:
    works = sys.modules["fake_prepare"].run

    def run(ctx: StageContext) -> StageResult:
        raise error

    sys.modules["fake_prepare"].run = run  # type: ignore[attr-defined]
    with pytest.raises(type(error)):
        run_stage(config, "prepare")
    folder = Path(config.output_dir) / "r" / "prepare"
    manifest = read_manifest(folder)
    assert manifest is not None and manifest.error == told
    sys.modules["fake_prepare"].run = works  # type: ignore[attr-defined]
    run_stage(config, "prepare")
    manifest = read_manifest(folder)
    assert manifest is not None and (manifest.status, manifest.error) == ("done", None)


@pytest.fixture
def older(stages: FakeStages, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Path]]:
    """Another process in the middle of prepare, which goes on when `go` appears: (its pid, the run's folder).

    It exits with 3 if it may not write any more, with 4 if it could.
    """
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    root = Path(config.output_dir) / "r"

    def wait(ctx: StageContext) -> StageResult:
        atomic_write(ctx.folder / "begun", "")
        while not (root / "go").exists():
            time.sleep(0.01)
        atomic_write(ctx.folder / "out.txt", "older")
        return StageResult(artifacts={"file": "out.txt"})

    module = sys.modules["fake_prepare"]
    quick = module.run
    module.run = wait  # type: ignore[attr-defined]
    pid = os.fork()
    if pid == 0:
        try:
            run_stage(config, "prepare")
            os._exit(4)
        except LeaseError as error:
            (root / "said").write_text(str(error))
            os._exit(3)
        finally:
            os._exit(5)
    module.run = quick  # type: ignore[attr-defined]
    while not (root / "prepare" / "begun").exists():
        time.sleep(0.01)
    yield pid, root
    (root / "go").touch()


def test_a_second_process_is_refused_while_the_first_works(older: tuple[int, Path], config: RunConfig) -> None:
    pid, root = older
    with pytest.raises(LeaseError, match=rf"prepare is in use \(job 12, restart 0, process {pid} on .*`kill {pid}`"):
        run_stage(config, "prepare")
    (root / "go").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 4
    assert (root / "prepare" / "out.txt").read_text() == "older"
    run_stage(config, "prepare")


def test_the_requeued_copy_takes_over_and_the_older_one_writes_nothing_more(
    older: tuple[int, Path], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, root = older
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    manifest = run_stage(config, "prepare")
    assert (manifest.status, manifest.num_resumes) == ("done", 1)
    content = (root / "prepare" / "manifest.json").read_text()
    (root / "go").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert "taken over (job 12, restart 1" in (root / "said").read_text()
    assert (root / "prepare" / "out.txt").read_text().startswith("prepare 1")
    assert (root / "prepare" / "manifest.json").read_text() == content
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(LeaseError, match="later start of this job"):
        run_stage(config, "prepare", force=True)
