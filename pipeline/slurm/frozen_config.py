"""The config as it was submitted, kept in the run folder: a config that was edited since then is noticed."""

from __future__ import annotations

import socket
from pathlib import Path

from ..config import RunConfig
from ..config_loading import config_differences, dump_resolved, flatten, load_config
from ..errors import ConfigError, ResourceError
from ..run_folder import atomic_write

VARIABLE = "HEDGEHOG_SUBMITTED_CONFIG"
"""Environment variable with which a job's script names the file."""
_FREE = ("slurm.", "logging.")
"""Sections that may change while jobs wait: they decide nothing that a stage computes."""
_OWN_OPTIONS = frozenset({"distill.layers"})
"""Given to a job on its command line."""


def freeze(config: RunConfig, file: Path) -> None:
    """Write the config that jobs are held to."""
    atomic_write(file, dump_resolved(config))


def differences(submitted: RunConfig, now: RunConfig) -> list[str]:
    """Lines such as `finetune.epochs: 2.0 → 3.0` for what matters to a job."""
    before, after = (
        {k: v for k, v in flatten(config).items() if not k.startswith(_FREE) and k not in _OWN_OPTIONS}
        for config in (submitted, now)
    )
    return config_differences(before, after)


def check_visible(file: Path) -> None:
    """Refuse to work on a node that does not see the run folder. Before the config is read: it may be missing too.

    Raises:
        ResourceError: the submitted config is not there. Every rank that does not see it says so, and where it is.
    """
    if not file.is_file():
        raise ResourceError(
            f"{socket.gethostname()} does not see {file}: the run folder must be on a file system that all nodes "
            "share, and must not be moved while its jobs wait. Set output_dir to a folder on one, then submit again."
        )


def check_unchanged(config: RunConfig, file: Path) -> None:
    """Refuse a job whose config is no longer the one that was submitted.

    Raises:
        ConfigError: with the differences.
    """
    changed = differences(load_config(file), config)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"the config was edited after this job was submitted (submitted → now):\n{lines}\n"
            "Undo the edit, then submit again; or, to run what it says now, `hedgehog cancel` the run and submit it "
            "under another name=…."
        )
