"""Scripts of jobs, from the templates in `slurm/`: only their three marked blocks are replaced."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..run_folder import RunFolder
from ..slurm_config import SlurmConfig
from .job_graph import Job
from .job_records import log_name
from .resources import stage_settings

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"
"""Beside `pipeline`, in a checkout and where the package is installed."""
_PLAIN = re.compile(r"[\w@%+=:,./-]+")


@dataclass(frozen=True)
class Launch:
    """How the program was called to submit, and where."""

    config: str
    overrides: tuple[str, ...]
    working_dir: Path


def render_script(job: Job, config: RunConfig, folder: RunFolder, launch: Launch) -> str:
    """A whole script for sbatch; all that is missing are the ids of the jobs to wait for."""
    settings = stage_settings(config, job.stage)
    template = (TEMPLATES / ("array.sbatch" if job.elements else "stage.sbatch")).read_text(encoding="utf-8")
    subcommand, *options = job.arguments
    arguments = [subcommand, launch.config, *launch.overrides, *options]
    what = [
        f"HEDGEHOG=({settings['command']})",
        f"ARGUMENTS=({shlex.join(arguments)})",
    ]
    srun_options = [word for line in settings["srun_lines"] or () for word in shlex.split(line)]
    if srun_options:
        what.append(f"SRUN_OPTIONS=({shlex.join(srun_options)})")
    if job.elements:
        what += [f"OPTION={job.element_option}", f"ELEMENTS=({' '.join(map(shlex.quote, job.elements))})"]
    what.append(f"SUBMITTED_CONFIG={shlex.quote(str(submitted_config(folder).absolute()))}")
    what.append(f"export HEDGEHOG_INTERRUPT_SIGNAL={config.slurm.signal}")
    header = f"# {config.name}: {job.name}, written by `hedgehog submit`. Submitting again writes it again."
    script = _replace_header(template, header)
    script = _fill(script, "options of sbatch", list(_directives(job, config, settings, folder, launch)))
    script = _fill(script, "environment", list(settings["setup"] or ()))
    return _fill(script, "what to run", what)


def submitted_config(folder: RunFolder) -> Path:
    """The resolved config as it was submitted."""
    return folder.slurm / "config.submitted.yaml"


def script_file(job: Job, folder: RunFolder) -> Path:
    """Where a job's script lies."""
    return folder.slurm / f"{job.name}.sbatch"


def array_spec(indices: Sequence[int], slurm: SlurmConfig) -> str:
    """`0-2,5%2`."""
    spans: list[list[int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"{text}%{slurm.array_throttle}" if slurm.array_throttle else text


def _directives(
    job: Job, config: RunConfig, settings: dict[str, Any], folder: RunFolder, launch: Launch
) -> Iterator[str]:
    slurm = config.slurm
    # Slurm puts something of its own in place of %j there, and of %% a percent sign
    log = f"{str(folder.logs.absolute()).replace('%', '%%')}/{log_name(job.name, is_array=bool(job.elements))}"
    yield _option("job-name", f"{config.name}.{job.name}")
    yield _option("chdir", str(launch.working_dir))
    yield _option("output", log)
    yield "#SBATCH --open-mode=append"
    yield "#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue"
    yield f"#SBATCH --signal={slurm.signal}@{slurm.grace_period_s}"
    if job.elements:
        yield _option("array", array_spec(range(len(job.elements)), slurm))
    yield _option("nodes", str(settings["nodes"]))
    yield _option("ntasks-per-node", str(settings["tasks_per_node"]))
    if settings["gpus"]:
        kind = f"{settings['gpu_type']}:" if settings["gpu_type"] else ""
        yield _option("gres", f"gpu:{kind}{settings['gpus']}")
    for name, option in (
        ("cpus_per_task", "cpus-per-task"),
        ("memory", "mem"),
        ("time", "time"),
        ("account", "account"),
        ("partition", "partition"),
        ("qos", "qos"),
        ("constraint", "constraint"),
    ):
        if settings[name] is not None:
            yield _option(option, str(settings[name]))
    for line in settings["sbatch_lines"] or ():
        yield f"#SBATCH {line}"


def _option(name: str, value: str) -> str:
    """As sbatch reads it: in quotation marks a backslash stands before one, and before a backslash."""
    if _PLAIN.fullmatch(value):
        return f"#SBATCH --{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH --{name}="{escaped}"'


def _fill(script: str, block: str, lines: list[str]) -> str:
    """Replace what stands between `# --- <block>…` and `# --- end`."""
    pattern = re.compile(rf"(^# --- {block}[^\n]*\n).*?(^# --- end$)", flags=re.MULTILINE | re.DOTALL)
    filled, count = pattern.subn(lambda found: found[1] + "".join(f"{line}\n" for line in lines) + found[2], script)
    assert count == 1, f"the template has no block '{block}'"
    return filled


def _replace_header(template: str, header: str) -> str:
    """The comment about using the template by hand gives way to what this script is."""
    first, _, rest = template.partition("\n")
    comment = re.match(r"(?:#(?! ---)[^\n]*\n)*", rest)
    assert comment is not None
    return f"{first}\n{header}\n{rest[comment.end() :]}"
