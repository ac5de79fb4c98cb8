"""The config's `slurm` section: what `hedgehog submit` asks of the scheduler, for all stages and for single ones."""

from __future__ import annotations

import shlex
from typing import Any, Literal

from pydantic import Field, field_validator

from .config_section import Section

_TIME = r"^(\d+-\d+(:\d\d){0,2}|\d+(:\d\d){0,2})$"
_MEMORY = r"^\d+(K|M|G|T)?$"
_WORD = r"^[^\s\"'$`\\]+$"


class SlurmResources(Section):
    """What one kind of job gets. Under a stage's name (`slurm.finetune`), null means: as in `slurm` itself."""

    account: str | None = Field(default=None, pattern=_WORD)
    """`--account`, one word."""
    partition: str | None = Field(default=None, pattern=_WORD)
    """`--partition`, one word; commas between several."""
    qos: str | None = Field(default=None, pattern=_WORD)
    """`--qos`, one word."""
    constraint: str | None = Field(default=None, pattern=_WORD)
    """`--constraint`, one word such as a100|h100."""
    time: str | None = Field(default=None, pattern=_TIME)
    """`--time`, in quotes: "90" (minutes), "12:00:00" or "2-00:00:00" (days-hours). Null: the partition's."""
    memory: str | None = Field(default=None, pattern=_MEMORY)
    """`--mem` of a node, such as 64G; "0" is all of it. Null: the partition's."""
    gpus: int | None = Field(default=None, ge=0)
    """GPUs on each node; one task a GPU."""
    gpu_type: str | None = Field(default=None, pattern=_WORD)
    """Kind of GPU, as the site names it: `--gres=gpu:<type>:<gpus>`."""
    nodes: int | None = Field(default=None, ge=1)
    """Nodes of a job, or of each element of an array."""
    tasks_per_node: int | None = Field(default=None, ge=1)
    """Processes on each node. Null: one a GPU, or one where there are none."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores of each process. Null: Slurm's own choice, one."""
    setup: tuple[str, ...] | None = None
    """Shell lines before the program starts: modules, conda, exports."""
    command: str | None = Field(default=None, min_length=1)
    """How a job calls this program, such as `apptainer exec --nv hedgehog.sif hedgehog`.
    Null: `hedgehog` where there are setup lines, else the Python that submits."""
    sbatch_lines: tuple[str, ...] | None = None
    """Further options of sbatch, such as `--mail-type=FAIL`."""
    srun_lines: tuple[str, ...] | None = None
    """Further options of srun, which starts the processes, such as `--container-image=…` for pyxis."""

    @field_validator("setup", "sbatch_lines", "srun_lines", mode="before")
    @classmethod
    def _one_line_is_a_list(cls, value: Any) -> Any:
        """A single text may stand for a list; a block of text (`|`) is its lines."""
        return tuple(line for line in value.splitlines() if line.strip()) if isinstance(value, str) else value

    @field_validator("sbatch_lines")
    @classmethod
    def _options_only(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """`#SBATCH` may be written or left out; what Slurm would not read as an option is refused."""
        if value is None:
            return None
        lines = tuple(line.strip().removeprefix("#SBATCH").strip() for line in value)
        for line in lines:
            if not line.startswith("-") or "\n" in line:
                raise ValueError(f"expected an option of sbatch such as --mail-type=FAIL, got {line!r}")
        return lines

    @field_validator("srun_lines")
    @classmethod
    def _words_only(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Options with their values, quoted as in a shell."""
        for line in value or ():
            try:
                words = shlex.split(line)
            except ValueError as error:
                raise ValueError(f"{line!r} cannot be split into words ({error})") from None
            if not words or not words[0].startswith("-"):
                raise ValueError(f"expected an option of srun such as --container-image=IMAGE, got {line!r}")
        return value


class SlurmConfig(SlurmResources):
    """How a run is laid out as jobs. `gpus`, `nodes` and `tasks_per_node` hold for distill, finetune and evaluate;
    prepare, merge and export are one task on no GPU unless their own section says otherwise."""

    gpus: int | None = Field(default=1, ge=0)
    """GPUs on each node; one task a GPU."""
    nodes: int | None = Field(default=1, ge=1)
    """Nodes of a job, or of each element of an array."""
    layer_groups: int = Field(default=4, ge=1)
    """Elements of distill's array, at most: their layers are balanced so that all end together. 1: no array."""
    trained_layer_cost: float | None = Field(default=None, gt=0)
    """Time to train a layer over the time to run it, for sizing the groups. Null: reckoned from FLOPs."""
    evaluate_shards: int = Field(default=1, ge=1)
    """Elements of evaluate's array, each with a part of the test rows. 1: no array."""
    array_throttle: int | None = Field(default=None, ge=1)
    """Elements of one array that run at a time. Null: as many as Slurm has room for."""
    signal: Literal["USR1", "USR2", "HUP"] = "USR2"
    """Warns the processes before a time limit or a preemption, so that they save and requeue (NCCL may take USR1).
    TERM and INT mean something else: a job that gets them leaves for good, unless Slurm says that it preempts it."""
    grace_period_s: int = Field(default=120, ge=1, le=65535)
    """Seconds between that signal and the time limit: longer than one step and one save take."""
    requeue: bool = True
    """Let Slurm start a job again after preemption or the loss of a node; it goes on from its checkpoint."""
    prepare: SlurmResources = SlurmResources()
    """What differs for prepare."""
    distill: SlurmResources = SlurmResources()
    """What differs for distill, or for each element of its array."""
    merge: SlurmResources = SlurmResources()
    """What differs for jobs that compute nothing: merges of arrays, and stages that a variant skips."""
    finetune: SlurmResources = SlurmResources()
    """What differs for finetune."""
    evaluate: SlurmResources = SlurmResources()
    """What differs for evaluate, or for each element of its array."""
    export: SlurmResources = SlurmResources()
    """What differs for export."""
