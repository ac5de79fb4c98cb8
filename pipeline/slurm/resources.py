"""What the jobs of a stage ask Slurm for: its own section of the config over the general one."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from ..config import RunConfig
from ..slurm_config import SlurmResources

_PARALLEL_STAGES = ("distill", "finetune", "evaluate")
"""Stages that get `slurm`'s own nodes, tasks and GPUs; the others are one task."""


def stage_settings(config: RunConfig, stage: str) -> dict[str, Any]:
    """What a job of this stage gets: its own section over the general one, and the defaults that follow from them."""
    general, own = config.slurm, getattr(config.slurm, stage)
    settings = {}
    for name in SlurmResources.model_fields:
        value = getattr(own, name)
        settings[name] = getattr(general, name) if value is None else value
    if stage not in _PARALLEL_STAGES:
        # prepare and merge have no use for a GPU, export hardly; but engine.device=cuda insists on one
        gpus = 1 if config.engine.device == "cuda" and general.gpus else 0
        for name, value in (("gpus", gpus), ("nodes", 1), ("tasks_per_node", 1)):
            settings[name] = value if getattr(own, name) is None else getattr(own, name)
    settings["nodes"] = settings["nodes"] or 1
    settings["tasks_per_node"] = settings["tasks_per_node"] or max(1, settings["gpus"] or 0)
    if settings["command"] is None:
        here = shlex.join([sys.executable, "-m", "hedgehog.pipeline.cli"])
        settings["command"] = "hedgehog" if settings["setup"] else here
    return settings


def world_size(config: RunConfig, stage: str) -> int:
    """Processes of a job of this stage, or of an element of its array."""
    settings = stage_settings(config, stage)
    return settings["nodes"] * settings["tasks_per_node"]
