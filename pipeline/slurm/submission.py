"""`hedgehog submit`: the jobs of a run that are missing, each waiting for its parents.

What is done is read from the manifests, what waits or runs from `slurm/jobs.json` and squeue; the rest is submitted.
"""

from __future__ import annotations

import shlex
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..config import RunConfig
from ..config_loading import dump_resolved, load_config, read_config
from ..errors import ConfigError
from ..lease import Lease
from ..preflight import add_problems, is_prepared, look_at_conversions, look_at_everything
from ..run_folder import STAGES, RunFolder, atomic_write, fenced, storage_errors
from .dry_run import describe_graph, describe_scripts
from .expected_memory import memory_lines
from .frozen_config import differences, freeze
from .job_graph import Job, JobGraph, Queued, build_graph
from .job_records import JobRecord, JobRecords, read_records, write_records
from .layout_checks import layout_errors
from .queue_lease import changing_the_queue
from .resources import stage_settings
from .scheduler import (
    ENDING_STATE,
    FAILED_STATES,
    TOKEN_PREFIX,
    DoubtfulSubmission,
    JobState,
    SchedulerError,
    SubmittedJob,
    queue_states,
    require_slurm,
    sbatch,
    script_options,
)
from .scripts import Launch, array_spec, render_script, script_file, submitted_config
from .sweep import SweepRun, read_sweep

_ENDING_S = 60.0
"""So long a job may be COMPLETING before it is taken for one that ends: Slurm gives its processes 30 s (KillWait)."""
_POLL_S = 1.0


@dataclass(frozen=True)
class Live:
    """A job or element that Slurm still has."""

    record: JobRecord
    index: int | None
    state: JobState

    @property
    def slurm_name(self) -> str:
        """`12` or `12_3`."""
        return self.record.job_id if self.index is None else f"{self.record.job_id}_{self.index}"


@dataclass
class Plan:
    """One run, looked at but not submitted yet."""

    config: RunConfig
    folder: RunFolder
    launch: Launch
    records: JobRecords
    graph: JobGraph
    live: list[Live] = field(default_factory=list)
    ending: list[Live] = field(default_factory=list)
    lease: Lease | None = None
    adopted: list[JobRecord] = field(default_factory=list)
    """Jobs that Slurm has though an earlier submit was not told so; not on record yet."""

    def live_of(self, job: Job) -> list[Live]:
        """What of this job waits or runs."""
        return [entry for entry in self.live if entry.record.name == job.name]

    def indices_to_submit(self, job: Job) -> tuple[int, ...]:
        """Elements of an array that are neither done nor in the queue."""
        queued = {entry.record.elements[entry.index] for entry in self.live_of(job) if entry.index is not None}
        return tuple(index for index in job.missing if job.elements[index] not in queued)


def submit(
    path: str,
    overrides: Sequence[str] = (),
    *,
    sweep: str | None = None,
    first: str | None = None,
    last: str | None = None,
    dry_run: bool = False,
) -> None:
    """Submit what is missing of a run, or of every run of a sweep. All runs are checked before the first is submitted.

    Args:
        first: the stage to begin with; those before it must be done or in the queue.
        last: the stage to end with.

    Raises:
        ConfigError: the config, the sweep or the run folder is wrong, there is no Slurm, or Slurm refuses a job.
        LeaseError: another `submit` or `cancel` is at work on one of the runs.
        SchedulerError: Slurm does not answer.
        CheckpointError, ModelError, ResourceError: the run folder or the base model cannot be read or written.
    """
    if not dry_run:
        require_slurm()
    runs = [SweepRun(path, (), "")] if sweep is None else read_sweep(Path(sweep), path, overrides)
    stages = _stages_between(first, last)
    with ExitStack() as held:
        plans = []
        for run in runs:
            try:
                config = load_run(run.config, (*overrides, *run.overrides))
            except ConfigError as error:
                raise ConfigError(f"{sweep}: {run.described}: {error}" if sweep else str(error)) from None
            lease = None if dry_run else held.enter_context(changing_the_queue(RunFolder.of(config), "submit"))
            plan = look_at_run(config, run.config, (*overrides, *run.overrides), stages, dry_run=dry_run)
            plan.lease = lease
            plans.append(plan)
        for number, plan in enumerate(plans):
            if number:
                print()
            if dry_run:
                print(describe_graph(plan.config, plan.folder, plan.graph))
                print("\n" + "\n".join(memory_lines(plan.config, stages)))
                print(describe_scripts(plan.config, plan.folder, plan.graph, plan.launch))
            else:
                with storage_errors("submit"):
                    submit_plan(plan, _command(path, overrides, sweep, first, last))


def load_run(path: str, overrides: Sequence[str]) -> RunConfig:
    """A run's config, after everything that can be refused before its folder is made. Imports no torch.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    reading = read_config(path, overrides)
    if reading.conversions:
        config = reading.conversions[0].config
        look = look_at_conversions if is_prepared(config) else look_at_everything
        found = look(reading, imports_torch=False)
        add_problems(reading, [*found.problems, *layout_errors(reading)])
    config = reading.valid_config()
    _check_place(config)
    return config


def look_at_run(
    config: RunConfig, path: str, overrides: Sequence[str], stages: Sequence[str] = STAGES, *, dry_run: bool = False
) -> Plan:
    """Find out what of a run is done, waits or runs.

    Raises:
        ConfigError, SchedulerError, CheckpointError, ModelError: see `submit`.
    """
    folder = RunFolder.of(config)
    launch = Launch(path, tuple(overrides), Path.cwd())
    records = read_records(folder)
    live: list[Live] = []
    ending: list[Live] = []
    try:
        adopted = records.adopt()
        states = _settled_states(records.submitted, 0.0 if dry_run else _ENDING_S)
    except SchedulerError:
        if not dry_run:
            raise
        adopted, states = [], {}
    doomed: set[str] = set()
    for record, index in records.newest():
        state = states.get((record.job_id, index))
        if state is None:
            continue
        entry = Live(record, index, state)
        if state.waits and _waits_in_vain(record, states, doomed):
            doomed.add(record.job_id)
            ending.append(entry)
        elif state.is_live:
            live.append(entry)
        elif state.state == ENDING_STATE:
            ending.append(entry)
    if live:
        _check_frozen(config, folder, live)
    elements: dict[str, list[str]] = {}
    for entry in live:
        if entry.index is not None:
            elements.setdefault(entry.record.name, []).append(entry.record.elements[entry.index])
    whole = frozenset(entry.record.name for entry in live if entry.index is None)
    graph = build_graph(config, folder, Queued(elements, whole), stages)
    plan = Plan(config, folder, launch, records, graph, live, ending, adopted=adopted)
    _check_parents(plan)
    return plan


def _settled_states(jobs: Sequence[SubmittedJob], patience_s: float) -> dict[tuple[str, int | None], JobState]:
    """What squeue shows once no job is COMPLETING: one that is being queued again looks like one that ends."""
    started = time.monotonic()
    told = False
    while True:
        states = queue_states(jobs)
        ending = [key for key, state in states.items() if state.state == ENDING_STATE]
        if not ending or time.monotonic() - started >= patience_s:
            return states
        if not told:
            print(
                f"{len(ending)} jobs are just ending or being queued again: waits up to {patience_s:.0f} s to see which"
            )
            told = True
        time.sleep(_POLL_S)


def _stages_between(first: str | None, last: str | None) -> tuple[str, ...]:
    start, end = STAGES.index(first or STAGES[0]), STAGES.index(last or STAGES[-1])
    if start > end:
        raise ConfigError(f"--from {first} comes after --to {last}; the order is {', '.join(STAGES)}.")
    return STAGES[start : end + 1]


def _check_parents(plan: Plan) -> None:
    """Refuse jobs that need what is neither done, nor in the queue, nor among the stages asked for."""
    for job in plan.graph.jobs:
        if not job.wanted or job.done:
            continue
        for parent in (plan.graph[name] for name in job.parents):
            missing = bool(plan.indices_to_submit(parent)) if parent.elements else not plan.live_of(parent)
            if not parent.wanted and not parent.done and missing:
                raise ConfigError(
                    f"{job.name} needs {parent.name}, which is neither done nor in the queue; begin with an earlier "
                    "stage: --from, or no --from at all."
                )


def _waits_in_vain(
    record: JobRecord, states: Mapping[tuple[str, int | None], JobState], doomed: Collection[str]
) -> bool:
    """Whether a job waits for one that failed: Slurm will take it out, but may not have done so yet."""
    needed = next((part for part in record.dependency.split(",") if part.startswith("afterok:")), "").split(":")[1:]
    for name in needed:
        job_id, _, index = name.partition("_")
        if job_id in doomed:
            return True
        for (other_id, other_index), state in states.items():
            if other_id == job_id and index in ("", str(other_index)) and state.state in FAILED_STATES:
                return True
    return False


def submit_plan(plan: Plan, command: list[str]) -> None:
    """Submit the missing jobs of one run, parents first, and say what was done.

    Every job is on record as soon as Slurm has it: where a later one is refused, submitting again goes on from there.

    Raises:
        ConfigError: Slurm refuses a job.
        SchedulerError: Slurm does not answer.
        LeaseError: another `submit` or `cancel` has taken over meanwhile.
    """
    with ExitStack() as held:
        if plan.lease is not None:
            held.enter_context(fenced(plan.lease))
        _check_lease(plan)
        _submit_plan(plan, command)


def _check_lease(plan: Plan) -> None:
    fault = plan.lease.fault() if plan.lease is not None else None
    if fault is not None:
        raise fault


def _submit_plan(plan: Plan, command: list[str]) -> None:
    folder, config = plan.folder, plan.config
    for path in (folder.logs, folder.slurm):
        path.mkdir(parents=True, exist_ok=True)
    if not folder.config_file.is_file():
        atomic_write(folder.config_file, dump_resolved(config))
    freeze(config, submitted_config(folder))
    if plan.adopted:
        write_records(folder, plan.records)
    plan.records.command = command
    print(f"{config.name}: {folder.root}")
    wanted = {job.run_stage for job in plan.graph.jobs if job.wanted and not job.done and not plan.live_of(job)}
    for line in memory_lines(config, tuple(wanted)) if wanted else ():
        print(f"  {line}")
    submitted: dict[str, list[str]] = {}
    num_submitted = 0
    for job in plan.graph.jobs:
        queued = plan.live_of(job)
        for entry in queued:
            submitted.setdefault(job.name, []).append(entry.slurm_name)
        # an export that is done takes up the scores of an evaluation that follows
        done = job.done and not (job.name == "export" and "evaluate" in submitted)
        if not job.wanted:
            continue
        indices = plan.indices_to_submit(job)
        if done or (job.elements and not job.missing):
            _say(job, "done")
            continue
        if not indices and queued:
            _say(job, f"in the queue as {', '.join(entry.slurm_name for entry in queued)}")
            continue
        atomic_write(script_file(job, folder), render_script(job, config, folder, plan.launch))
        dependency = _dependency(plan, job, submitted)
        options = ["--kill-on-invalid-dep=yes"]
        if dependency:
            options.append(f"--dependency={dependency}")
        if job.elements:
            options.append(f"--array={array_spec(indices, config.slurm)}")
        intent = JobRecord(
            name=job.name,
            stage=job.run_stage,
            variant=job.variant,
            job_id="",
            elements={index: job.elements[index] for index in indices},
            parts=list(job.elements),
            dependency=dependency,
            script=str(script_file(job, folder)),
            submitted_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            token=f"{TOKEN_PREFIX}{uuid.uuid4().hex}",
            slurm_name=_name_in_slurm(script_file(job, folder)),
        )
        try:
            job_id = _submit_job(plan, job, options, intent)
        except ConfigError as error:
            if not submitted:
                raise
            raise ConfigError(
                f"{error}\nWhat was submitted before it stays in the queue; correct this and submit again: only what "
                "is missing will be submitted. `hedgehog cancel` takes it all back."
            ) from None
        submitted.setdefault(job.name, []).append(job_id)
        num_submitted += 1
        after = f", after {dependency.replace('afterok:', '')}" if dependency else ""
        parts = f" {', '.join(job.elements[index] for index in indices)}" if job.elements else ""
        _say(job, f"submitted{parts} as {job_id}{after}")
    if num_submitted == 0:
        print("nothing to submit.")
    if submitted:
        print(f"to watch: hedgehog status {shlex.quote(str(folder.root))} --watch")


def _submit_job(plan: Plan, job: Job, options: Sequence[str], intent: JobRecord) -> str:
    """Submit one job so that it is on record whatever happens on the way; returns its id."""
    script = script_file(job, plan.folder)
    own = script_options(script).get("--comment", "")
    comment = f"--comment={own} {intent.token}" if own else f"--comment={intent.token}"
    plan.records.intents.append(intent)
    write_records(plan.folder, plan.records)
    settings = _known_settings(plan.config, job.stage)
    _check_lease(plan)
    try:
        job_id = sbatch(script, [*options, comment], stage=job.stage, settings=settings)
    except ConfigError:
        plan.records.intents.remove(intent)
        write_records(plan.folder, plan.records)
        raise
    except DoubtfulSubmission as error:
        try:
            adopted = [record for record in plan.records.adopt() if record.token == intent.token]
        except SchedulerError:
            raise error from None
        if not adopted:
            raise
        job_id = adopted[0].job_id
    else:
        plan.records.intents.remove(intent)
        plan.records.jobs.append(intent.model_copy(update={"job_id": job_id}))
    write_records(plan.folder, plan.records)
    return job_id


def _name_in_slurm(script: Path) -> str:
    """A line of the user's may give the job another name than ours."""
    options = script_options(script)
    return options.get("-J", options["--job-name"])


def _say(job: Job, what: str) -> None:
    print(f"  {job.name:<20} {what}")


def _dependency(plan: Plan, job: Job, submitted: dict[str, list[str]]) -> str:
    """`afterok` on the parents in the queue; `afterany` on an earlier attempt at this job that is just ending."""
    parents = [slurm_name for parent in job.parents for slurm_name in submitted.get(parent, ())]
    ending = [entry.slurm_name for entry in plan.ending if entry.record.name == job.name]
    parts = [f"afterok:{':'.join(parents)}"] if parents else []
    if ending:
        parts.append(f"afterany:{':'.join(ending)}")
    return ",".join(parts)


def _check_place(config: RunConfig) -> None:
    """Refuse a run folder inside another run's: cleaning up there would take this one along. And one that no job could
    write its log to."""
    folder = RunFolder.of(config).root
    if "\\" in str(folder.absolute()):
        raise ConfigError(f"output_dir: {folder.absolute()} has a backslash, which Slurm takes out of a log's place.")
    for parent in folder.absolute().parents:
        if RunFolder(parent).config_file.is_file():
            raise ConfigError(f"output_dir: {folder} lies in the run folder {parent}; choose another output_dir.")


def _check_frozen(config: RunConfig, folder: RunFolder, live: Sequence[Live]) -> None:
    """Refuse another config while jobs of an earlier one wait or run."""
    file = submitted_config(folder)
    if not file.is_file():
        return
    changed = differences(load_config(file), config)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        names = ", ".join(entry.slurm_name for entry in live)
        raise ConfigError(
            f"{folder.root}: jobs of another config are still in the queue ({names}):\n{lines}\n"
            f"Undo the change, choose another name=…, or cancel them first: hedgehog cancel {folder.root}"
        )


def _known_settings(config: RunConfig, stage: str) -> dict[str, object]:
    slurm = config.slurm
    return {
        **stage_settings(config, stage),
        "layer_groups": slurm.layer_groups,
        "evaluate_shards": slurm.evaluate_shards,
    }


def _command(path: str, overrides: Sequence[str], sweep: str | None, first: str | None, last: str | None) -> list[str]:
    options = [("--sweep", sweep), ("--from", first), ("--to", last)]
    given = [word for name, value in options if value is not None for word in (name, value)]
    return ["hedgehog", "submit", path, *overrides, *given]
