"""Slurm's own commands: submit, look, cancel. Their words are passed on to the user, with the config key to change."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, HedgehogError

RUNNING_STATES = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"})
ENDING_STATE = "COMPLETING"
"""The job's processes may still be there, but what they have not finished stays so."""
FAILED_STATES = frozenset(
    {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "REVOKED"}
)
_ENDED_STATES = FAILED_STATES | {"COMPLETED", "DELETED"}
_TIMEOUT_S = 60
_POLICY = r"accounting/qos policy|MaxSubmit|QOS\w*Limit|Assoc\w*Limit"
"""A limit on how much a user, account or QOS may ask for; it names an account that may well be the right one."""
_KEYS = (
    (_POLICY, ("qos", "time", "layer_groups")),
    (r"\baccount\b", ("account", "partition")),  # "Invalid account or account/partition combination"
    (r"partition", ("partition",)),
    (r"qos", ("qos",)),
    (r"feature|constraint", ("constraint",)),
    (r"time limit|time specification", ("time",)),
    (r"memory", ("memory",)),
    (r"gres|generic resource|gpu", ("gpus", "gpu_type")),
    (r"cpu count|more processors", ("cpus_per_task", "tasks_per_node")),
    (r"node count", ("nodes",)),
    (r"array", ("layer_groups", "evaluate_shards")),
    (r"option|unrecognized", ("sbatch_lines",)),
    (
        r"node configuration",
        ("gpus", "gpu_type", "constraint", "nodes", "tasks_per_node", "cpus_per_task", "memory"),
    ),
)
"""What Slurm's complaint mentions, and the keys under `slurm` that it may be about."""
_RUN_WIDE_KEYS = ("layer_groups", "evaluate_shards")
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "HEDGEHOG_SUBMITTED_CONFIG"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
"""Of the ranks that this process is one of; and where they meet, which a job's ranks would look for in vain."""
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")
"""Slurm sets them in an allocation with GPUs, and a job without GPUs would inherit them."""
_SITE_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
_DEFAULT_VARIABLES = {
    "SBATCH_ACCOUNT": ("--account", "-A"),
    "SBATCH_PARTITION": ("--partition", "-p"),
    "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_TIMELIMIT": ("--time", "-t"),
    "SBATCH_CONSTRAINT": ("--constraint", "-C"),
    "SBATCH_RESERVATION": ("--reservation",),
}
"""What a user's environment may decide where the script does not. sbatch ranks its variables above `#SBATCH` lines, and
the others (SBATCH_EXPORT, SBATCH_SIGNAL, SBATCH_NO_REQUEUE, SBATCH_WAIT, …) change what the scripts rely on."""
_FILTER_VARIABLES = ("SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_")
"""They hide jobs, change columns, or ask before they cancel."""
_FORMAT_VARIABLES = ("SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN", "SLURM_JSON", "SLURM_YAML", "SLURM_DEBUG_FLAGS")
"""They change what several commands print."""
_DOUBTFUL = re.compile(
    r"timed out|zero bytes|connection (reset|refused|closed)|communication|unable to contact", re.IGNORECASE
)
"""sbatch lost the controller, which may have taken the job all the same."""
_ALREADY_ENDED = re.compile(r"already completing or completed|invalid job id", re.IGNORECASE)


TOKEN_PREFIX = "hedgehog:"
"""Begins the last word of a job's comment, by which `submit` knows it again."""


class SchedulerError(HedgehogError):
    """Slurm does not answer, or refuses."""


class DoubtfulSubmission(SchedulerError):
    """sbatch got no answer: Slurm may have the job or not."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job as it was submitted: what tells it from a job of another cluster that has the same id."""

    job_id: str
    token: str = ""
    """Last word of its comment. Empty: not known."""
    name: str = ""
    """Its name in Slurm, for sites that write comments of their own. Empty: not known, and any job with the id is
    taken for it."""

    def is_shown_as(self, name: str, comment: str | None = None) -> bool:
        """Whether a job of this id with this name and comment (None: not shown) is this one."""
        last = (comment or "").split()[-1:]
        if self.token and last and last[0].startswith(TOKEN_PREFIX):
            return last[0] == self.token  # another's says that the id is another cluster's, or was given anew
        return not self.name or name == self.name


@dataclass(frozen=True)
class JobState:
    """A job, or one element of an array, as Slurm sees it."""

    state: str
    """`RUNNING`, `FAILED`, … as squeue and sacct write it."""
    reason: str = ""
    """Why it waits, or its exit code."""

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs: all but known ends. Slurm has states that are shown to few (RESV_DEL_HOLD), and
        gets more; a job that is taken for ended would be submitted twice."""
        return self.state not in ("", ENDING_STATE) and self.state not in _ENDED_STATES

    @property
    def waits(self) -> bool:
        """Whether it is live and has no processes."""
        return self.is_live and self.state not in RUNNING_STATES


@dataclass
class Observation:
    """What Slurm knows about some jobs, by (job id, array index or None)."""

    states: dict[tuple[str, int | None], JobState] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Why a source is missing."""
    num_sources: int = 0


def require_slurm() -> None:
    """Refuse where Slurm's commands are not on the path.

    Raises:
        ConfigError: says what to do instead.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch: not found on the path, so nothing can be submitted from here. Log in to a node that has Slurm's "
            "commands (or `module load slurm`); `hedgehog submit --dry-run` shows the scripts without Slurm, and "
            "`hedgehog run` needs none."
        )


def sbatch(script: Path, options: Sequence[str], *, stage: str, settings: Mapping[str, object]) -> str:
    """Submit a script; returns the job's id.

    Args:
        stage: key under `slurm` whose settings the job has.
        settings: those settings by name, for the message.

    Raises:
        ConfigError: Slurm refuses; its own words, and the keys to change.
        DoubtfulSubmission: there was no answer, and the job may have been submitted.
    """
    environment = submission_environment(os.environ, script_options(script))
    try:
        done = _run(["sbatch", "--parsable", *options, str(script)], environment)
    except _NoAnswerError as error:
        raise _in_doubt(stage, str(error)) from None
    # `12` or `12;cluster`, perhaps among the words of a site's own
    found = re.findall(r"^\s*(\d+)(?:;\S*)?\s*$", done.stdout, flags=re.MULTILINE)
    if done.returncode == 0 and found:
        return found[-1]
    if done.returncode == 0 or _DOUBTFUL.search(_words(done)):
        raise _in_doubt(stage, _words(done))
    raise ConfigError(refusal(stage, _words(done), settings))


def script_options(script: Path) -> dict[str, str]:
    """The options on a script's `#SBATCH` lines, as they are written there (`--time`, `-t`), with their values."""
    found = {}
    for line in script.read_text(encoding="utf-8").splitlines():
        if line.startswith("#SBATCH "):
            found |= line_options(line.removeprefix("#SBATCH "))
    return found


def line_options(line: str) -> dict[str, str]:
    """The options on one line: `--time=3 -A proj` → `{"--time": "3", "-A": "proj"}`."""
    found: dict[str, str] = {}
    name = ""
    try:
        words = shlex.split(line)
    except ValueError:  # a lone quote: sbatch will say so
        words = line.split()
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
        elif word.startswith("-"):
            name, value = word[:2], word[2:].removeprefix("=")
        else:
            value = word
        found[name] = value
    return found


def _in_doubt(stage: str, words: str) -> DoubtfulSubmission:
    return DoubtfulSubmission(
        f"{words}\nThe job of {stage} may have been submitted or not: run the same command again, it will find "
        "out, and submit nothing twice."
    )


def refusal(stage: str, words: str, settings: Mapping[str, object]) -> str:
    """The message about a refused job, with the keys that Slurm's words point at."""
    keys = next((keys for pattern, keys in _KEYS if re.search(pattern, words, flags=re.IGNORECASE)), ())
    shown = []
    for key in keys:
        value = "" if settings.get(key) is None else f" (now {settings[key]})"
        names = f"slurm.{key}" if key in _RUN_WIDE_KEYS else f"slurm.{key} or slurm.{stage}.{key}"
        shown.append(f"{names}{value}")
    cure = f"Change {'; '.join(shown)}." if shown else "See the keys under `slurm` in the config."
    if re.search(_POLICY, words, flags=re.IGNORECASE):
        cure += " Or wait until some of your jobs have ended, and submit again."
    return f"slurm refused the job of {stage}: {words}\n{cure}"


def submission_environment(environment: Mapping[str, str], decided: Collection[str] = ()) -> dict[str, str]:
    """The environment for sbatch, which jobs inherit: without the ranks and the job that this process is part of, and
    without what would overrule the script.

    Args:
        decided: options that the script has, such as `--account`.
    """
    kept = {name: value for name, value in environment.items() if name not in _RANK_VARIABLES}
    for name in [name for name in kept if name.startswith("SBATCH_")]:
        options = _DEFAULT_VARIABLES.get(name)
        if options is None or any(option in decided for option in options):
            del kept[name]
    if "SLURM_JOB_ID" in kept:  # submitted from inside a job, or an allocation of salloc
        own = ("SLURM_", "SLURMD_", "SRUN_", "SALLOC_", *_DEVICE_VARIABLES)
        kept = {name: value for name, value in kept.items() if name in _SITE_VARIABLES or not name.startswith(own)}
    return kept


def command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands: without what makes them show less than all, or in another form."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_FILTER_VARIABLES) and name not in _FORMAT_VARIABLES
    }


def queue_states(jobs: Iterable[SubmittedJob]) -> dict[tuple[str, int | None], JobState]:
    """What squeue shows of these jobs, jobs that ended a few minutes ago included. Other jobs with the same ids, as a
    second cluster on the same file system may have them, are left out.

    Raises:
        SchedulerError: squeue is missing or fails.
    """
    wanted = {job.job_id: job for job in jobs}
    if not wanted:
        return {}
    # %F array's id, %K index (or N/A), %T state, %r reason, %j name, %k comment; -r: one line an element
    columns = "--format=%F|%K|%T|%r|%j|%k"
    # --all: jobs in hidden partitions too
    done = _run(["squeue", "--noheader", "--all", "--array", "--states=all", columns, f"--jobs={','.join(wanted)}"])
    if done.returncode != 0:
        if "invalid job id" in done.stderr.lower():  # the only one asked for is forgotten
            return {}
        raise SchedulerError(f"squeue does not answer: {_words(done)}")
    states = {}
    for line in done.stdout.splitlines():
        job_id, index, state, reason, name, comment = (*line.strip().split("|", 5), *[""] * 5)[:6]
        if job_id in wanted and wanted[job_id].is_shown_as(name, comment):
            states[job_id, int(index) if index.isdigit() else None] = JobState(
                state, "" if reason == "None" else reason
            )
    return states


def jobs_by_token(tokens: Collection[str]) -> dict[str, str]:
    """Ids of this user's jobs whose comment ends with one of these tokens, by token.

    Raises:
        SchedulerError: squeue is missing or fails.
    """
    if not tokens:
        return {}
    # %F array's id, %k comment
    done = _run(["squeue", "--noheader", "--all", "--array", "--states=all", f"--user={os.getuid()}", "--format=%F|%k"])
    if done.returncode != 0:
        raise SchedulerError(f"squeue does not answer: {_words(done)}")
    found = {}
    for line in done.stdout.splitlines():
        job_id, _, comment = line.strip().partition("|")
        token = comment.split()[-1] if comment.strip() else ""
        if token in tokens:
            found[token] = job_id
    return found


def accounted_states(jobs: Iterable[SubmittedJob]) -> dict[tuple[str, int | None], JobState]:
    """What sacct has recorded about these jobs. It rarely keeps comments: a job of another name is another job.

    Raises:
        SchedulerError: sacct is missing or refuses, as it does on clusters without accounting.
    """
    wanted = {job.job_id: job for job in jobs}
    if not wanted:
        return {}
    columns = "--format=JobID,State,ExitCode,JobName"
    done = _run(["sacct", "--noheader", "--parsable2", "--allocations", columns, f"--jobs={','.join(wanted)}"])
    if done.returncode != 0 or "disabled" in done.stderr:
        raise SchedulerError(f"sacct does not answer: {_words(done)}")
    states = {}
    for line in done.stdout.splitlines():
        shown_id, state, exit_code, name = (*line.split("|"), "", "", "")[:4]
        job_id, _, index = shown_id.partition("_")
        if job_id not in wanted or not wanted[job_id].is_shown_as(name):
            continue
        if index and not index.isdigit() and JobState(state.split(" ")[0]).is_live:
            continue  # the elements that wait, in one row: squeue has them
        reason = "" if exit_code in ("0:0", "") else f"exit code {exit_code.removesuffix(':0')}"
        states[job_id, int(index) if index.isdigit() else None] = JobState(state.split(" ")[0], reason)
    return states


def observe(jobs: Iterable[SubmittedJob]) -> Observation:
    """What both commands know; squeue is the fresher one. Never raises: a missing source is a note."""
    wanted = list(jobs)
    seen = Observation()
    for source in (accounted_states, queue_states):
        try:
            states = source(wanted)
        except SchedulerError as error:
            seen.notes.append(str(error))
            continue
        seen.num_sources += 1
        for key, state in states.items():
            recorded = seen.states.get(key)
            if recorded is None or recorded.state != state.state or state.is_live:
                seen.states[key] = state  # of an end that both know, sacct has the exit code
    return seen


def scancel(jobs: Sequence[str]) -> None:
    """Cancel jobs or elements (`12`, `12_3`). One that has ended meanwhile is no fault.

    Raises:
        SchedulerError: scancel is missing or fails.
    """
    done = _run(["scancel", *jobs])
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 0 and not (lines and all(_ALREADY_ENDED.search(line) for line in lines)):
        raise SchedulerError(f"scancel refuses: {_words(done)}")


class _NoAnswerError(SchedulerError):
    """A command was given up."""


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # a site's own messages, and others' comments
            timeout=_TIMEOUT_S,
            env=command_environment(os.environ if environment is None else environment),
        )
    except FileNotFoundError:
        raise SchedulerError(f"{command[0]}: not found on the path.") from None
    except subprocess.TimeoutExpired:
        raise _NoAnswerError(f"{command[0]}: no answer in {_TIMEOUT_S} s; Slurm's controller may be down.") from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command says went wrong, on one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " ".join(lines) or f"exit code {done.returncode} without a word"
