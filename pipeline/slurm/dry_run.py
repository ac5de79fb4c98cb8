"""What `hedgehog submit --dry-run` shows: the graph, what each group of layers costs, the scripts."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import RunConfig
from ..run_folder import RunFolder
from .gpu_hours import GATHER_BYTES_PER_S, PEAK_FLOPS_PER_S, REFERENCE_FLOPS_PER_S, UTILISATION
from .job_graph import GroupCosts, Job, JobGraph
from .layer_groups import LOSS_SLOWNESS, layers_text
from .resources import stage_settings, world_size
from .scripts import Launch, render_script, script_file

_LITTLE_GAIN = 1.3
"""An array that is less than so many times as fast as one job is pointed out."""


def describe_graph(config: RunConfig, folder: RunFolder, graph: JobGraph) -> str:
    """The jobs with their parents and sizes, then the cost of every group of layers."""
    wanted = [job for job in graph.jobs if job.wanted]
    lines = [f"{config.name}: {len(wanted)} jobs for {folder.root}"]
    for job in wanted:
        after = f"after {', '.join(job.parents)}" if job.parents else ""
        lines.append(f"  {job.name:<22} {_size(config, job):<44} {_state(job):<14} {after}".rstrip())
    for costs in graph.costs:
        lines += ["", *_cost_lines(config, costs)]
    if graph.finetune_gpu_hours:
        again = ", forward again for gradient_checkpointing" if config.finetune.gradient_checkpointing else ""
        hours = ", ".join(f"{name} {figure:.2f}" for name, figure in graph.finetune_gpu_hours.items())
        lines += ["", f"GPU-hours of finetuning (forward, the gradient of activations{again}): {hours}"]
    if graph.costs or graph.finetune_gpu_hours:
        lines += [
            "",
            f"GPU-hours are reckoned, not measured: A100s at {UTILISATION * 100:.0f} % of their "
            f"{PEAK_FLOPS_PER_S / 1e12:.0f} TFLOP/s in bfloat16. Not in them: a job's start, loading, validation, "
            "checkpoints, padding, evaluate and export.",
        ]
    return "\n".join(lines)


def describe_scripts(config: RunConfig, folder: RunFolder, graph: JobGraph, launch: Launch) -> str:
    """Every script that would be submitted, as it would be written."""
    parts = []
    for job in graph.jobs:
        if not job.wanted or job.done or (job.elements and not job.missing):
            continue
        parts.append(f"\n##### {script_file(job, folder)}\n{render_script(job, config, folder, launch)}")
    return "\n".join(parts)


def _size(config: RunConfig, job: Job) -> str:
    settings = stage_settings(config, job.stage)
    tasks = settings["nodes"] * settings["tasks_per_node"]
    parts = [f"{len(job.elements)} elements x" if job.elements else "", f"{tasks} task{'s' if tasks > 1 else ''}"]
    if settings["nodes"] > 1:
        parts.append(f"on {settings['nodes']} nodes")
    if settings["gpus"]:
        parts.append(f"with {settings['nodes'] * settings['gpus']} GPU{'s' if settings['gpus'] > 1 else ''}")
    return " ".join(part for part in parts if part)


def _state(job: Job) -> str:
    if job.done or (job.elements and not job.missing):
        return "done"
    if job.done_elements:
        return f"{len(job.done_elements)} done"
    return ""


def _cost_lines(config: RunConfig, costs: GroupCosts) -> Iterator[str]:
    """A line a group: what it runs, what it trains, and how long that takes beside the dearest group."""
    unit = costs.cost.forward
    dearest = max(costs.cost.of(group) for group in costs.groups)
    alone = costs.cost.of([layer for group in costs.groups for layer in group])
    assumed = ", assumed" if costs.assumed_length else ""
    yield (
        f"{costs.job}: cost of a group = teacher layers it runs + {costs.cost.own / unit:.2f} x layers it trains, in "
        f"forward passes of a layer"
    )
    if config.slurm.trained_layer_cost is not None:
        yield f"  (slurm.trained_layer_cost; {costs.row_tokens:.0f} tokens a row{assumed})"
    else:
        slower = f", a FLOP of the float32 loss taken for {LOSS_SLOWNESS:g} of the bfloat16 teacher's, a guess"
        slower = slower if config.engine.precision == "bfloat16" else ""
        yield (
            f"  (reckoned from FLOPs at {costs.row_tokens:.0f} tokens a row{assumed}{slower}; short rows leave a GPU "
            "idle: measured it can be more, see slurm.trained_layer_cost)"
        )
    if costs.gathers:
        tasks = world_size(config, "distill")
        yield (
            f"  (ZeRO-3: a layer waits {costs.gathers:.1f} times as long for its weights as its teacher computes; each "
            f"of {tasks} GPUs receives {tasks - 1}/{tasks} of them at {GATHER_BYTES_PER_S / 1e9:.0f} GB/s for every "
            "micro-batch, so larger ones are cheaper)"
        )
    if costs.cost.lower_share < 1:
        yield (
            f"  (layers below a group's first count {costs.cost.lower_share:.2f}: distill.cache_hidden_states runs "
            "them once per row, not in every epoch)"
        )
    hours = " GPU-hours" if costs.num_tokens else ""
    yield f"  {'element':<8} {'layers':<14} {'runs':>5} {'trains':>7} {'cost':>8} {'share':>7}{hours}"
    total_hours = 0.0
    for index, group in enumerate(costs.groups):
        cost = costs.cost.of(group)
        row = (
            f"  {index:<8} {layers_text(group):<14} {max(group) + 1:>5} {len(group):>7} {cost / unit:>8.1f} "
            f"{cost / dearest:>6.0%}"
        )
        if costs.num_tokens:
            group_hours = costs.num_tokens * cost / REFERENCE_FLOPS_PER_S / 3600
            total_hours += group_hours
            row += f" {group_hours:>10.2f}"
        yield row
    work = sum(costs.cost.of(group) for group in costs.groups)
    if costs.num_tokens:
        yield f"  {total_hours:.2f} GPU-hours in all"
    if len(costs.groups) == 1:
        return
    yield (
        f"  one job would take {alone / dearest:.1f} times as long as this array; the array does {work / alone:.1f} "
        "times its work"
    )
    if alone < _LITTLE_GAIN * dearest:
        yield "  the teacher's pass decides here, so the array gains little: slurm.layer_groups=1 saves its extra work"
    if len(costs.groups) < config.slurm.layer_groups:
        yield f"  {len(costs.groups)} elements, not {config.slurm.layer_groups}: more would not end earlier"
