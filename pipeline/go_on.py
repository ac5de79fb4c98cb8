"""The command that goes on where a run stopped: told after an interruption, and by `status`. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .run_folder import RunFolder

if TYPE_CHECKING:
    from .config import RunConfig
    from .status import StageStatus

_MODULE = ("-m", "hedgehog.pipeline.cli")
_TO_DO = ("not started", "unfinished")


def own_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command line of this process, which goes on where it stops: the same, but --force would begin anew.

    torchrun on one machine is told from its variables; on several, each has a command of its own.
    """
    program: tuple[str, ...] = ("hedgehog",)
    size = os.environ.get("LOCAL_WORLD_SIZE")
    if "TORCHELASTIC_RUN_ID" in os.environ and size is not None and size == os.environ.get("WORLD_SIZE"):
        program = ("torchrun", "--nproc-per-node", size, *_MODULE)
    return (*program, *(argument for argument in arguments if argument != "--force"))


def shown(command: Sequence[str]) -> str:
    """As it is typed into a shell."""
    return shlex.join(command)


def commands_to_finish(
    folder: RunFolder, config: RunConfig | None, stages: Sequence[StageStatus]
) -> Iterator[tuple[str, ...]]:
    """What finishes the run: what was begun and stopped, with its own command; merges of subsets; then the rest.

    A stage's own command is known where it was given in this directory and the folder was not moved since; otherwise
    the resolved config stands in.
    """
    if config is None:
        if any(stage.state in _TO_DO for stage in stages):
            yield ("hedgehog", "run", "CONFIG")
        return
    where = _where(folder, config)
    moved = len(where) > 1

    def recorded(stage: StageStatus) -> tuple[str, ...]:
        return () if moved or stage.directory != str(Path.cwd()) else stage.command

    subsets = [stage for stage in stages if stage.layers is not None]
    for stage in subsets:
        if stage.state == "unfinished":
            yield recorded(stage) or _command("distill", where, ["--layers", stage.layers or ""], stage.variant)
    whole = {stage.variant: stage.state for stage in stages if stage.stage == "distill" and stage.layers is None}
    for variant in dict.fromkeys(stage.variant for stage in subsets):
        if whole.get(variant) == "not started":
            yield _command("merge", where, [], variant)
    others = [stage for stage in stages if stage.layers is None]
    begun = [stage for stage in others if stage.state == "unfinished"]
    single = [stage for stage in begun if recorded(stage) and not _runs_everything(recorded(stage))]
    yield from dict.fromkeys(recorded(stage) for stage in single)
    if any(stage.state in _TO_DO and stage not in single for stage in others):
        newest = next((recorded(stage) for stage in (*begun, *reversed(others)) if recorded(stage)), ())
        yield newest if _runs_everything(newest) else _command("run", where, [], None)


def commands_to_renew(
    folder: RunFolder, config: RunConfig | None, stages: Sequence[StageStatus]
) -> Iterator[tuple[str, ...]]:
    """What makes stages and subsets of layers anew, each by itself, in the order given."""
    where = ["CONFIG"] if config is None else _where(folder, config)
    in_parts = {stage.variant for stage in stages if stage.layers is not None}
    for stage in stages:
        merges = stage.stage == "distill" and stage.layers is None and stage.variant in in_parts
        options = [*(["--layers", stage.layers] if stage.layers is not None else []), "--force"]
        yield _command("merge" if merges else stage.stage, where, options, stage.variant)


def _where(folder: RunFolder, config: RunConfig) -> list[str]:
    """The resolved config, and what makes it mean this folder where that was moved."""
    where = [str(folder.config_file)]
    if Path(config.output_dir) != folder.root.parent:
        where.append(f"output_dir={folder.root.parent}")
    if config.name != folder.root.name:
        where.append(f"name={folder.root.name}")
    return where


def _runs_everything(command: Sequence[str]) -> bool:
    begin = command.index(_MODULE[-1]) + 1 if _MODULE[-1] in command else 1
    words = command[begin:]
    return tuple(words[:1]) == ("run",) and not any(word.startswith(("--from", "--to")) for word in words)


def _command(name: str, where: Sequence[str], options: Sequence[str], variant: str | None) -> tuple[str, ...]:
    return ("hedgehog", name, *where, *options, *(["--variant", variant] if variant else []))
