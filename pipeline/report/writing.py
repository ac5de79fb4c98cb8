"""`hedgehog report`: read a run, write its page."""

from __future__ import annotations

import os
import shlex
import stat
from datetime import datetime, timezone
from pathlib import Path

from ..errors import ConfigError, ResourceError
from ..run_folder import atomic_write
from .page import page
from .run_files import read_run

FILE_NAME = "report.html"


def write_report(run: str, output: Path | str | None = None) -> Path:
    """Write the page of a run in one step, over an earlier one, and return where it is.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.
        output: the file; None is `report.html` in the run folder. A symbolic link is followed. A folder that is
            missing is made, but what ends in a slash is a folder, and no file.

    Raises:
        ConfigError: no such run, no stage of it has begun, or `output` is a folder or no file that can be replaced.
        CheckpointError: a manifest, the resolved config or the list of jobs cannot be read.
        ResourceError: the file cannot be written, or the run not be read.
    """
    files = read_run(run)
    file = files.folder.root / FILE_NAME if output is None else Path(output)
    content = page(files, datetime.now(timezone.utc))
    try:
        target = _target(file, is_folder=str(output or "").endswith("/"))
        atomic_write(target, content, several_writers=True)
    except OSError as error:
        cure = f"Give another place: hedgehog report {shlex.quote(run)} --output FILE"
        raise ResourceError(f"{file}: cannot be written ({error.strerror}). {cure}") from error
    return file


def _target(file: Path, *, is_folder: bool) -> Path:
    """Where the page is written for a file that the user names: behind links, which stay.

    Raises:
        ConfigError: it is no file that can be replaced.
        OSError: the operating system does not even let it be looked at.
    """
    if str(file) == "-":
        raise ConfigError(f"--output -: the page goes to a file, not to the terminal; --output {FILE_NAME}")
    target = Path(os.path.realpath(file))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if is_folder or (mode is not None and stat.S_ISDIR(mode)):
        cure = shlex.quote(str(file / FILE_NAME))
        raise ConfigError(f"--output {file} is a folder: name a file in it, --output {cure}")
    if mode is not None and not stat.S_ISREG(mode):
        raise ConfigError(f"--output {file} is no ordinary file, and cannot be replaced; --output {FILE_NAME}")
    return target
