"""`hedgehog report`: read a run, write its page."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from ..errors import ConfigError, ResourceError
from ..run_folder import atomic_write
from .page import page
from .run_files import read_run

FILE_NAME = "report.html"


def write_report(run: str, output: Path | None = None) -> Path:
    """Write the page of a run in one step, over an earlier one, and return where it is.

    Args:
        run: a run folder, its name under `runs/`, or a YAML that names it.
        output: the file; None is `report.html` in the run folder.

    Raises:
        ConfigError: no such run, no stage of it has begun, or `output` is a folder.
        CheckpointError: a manifest or the resolved config cannot be read.
        ResourceError: the file cannot be written.
    """
    files = read_run(run)
    file = files.folder.root / FILE_NAME if output is None else output
    if file.is_dir():
        raise ConfigError(f"{file} is a folder: name a file in it, --output {file / FILE_NAME}")
    content = page(files, datetime.now(timezone.utc))
    try:
        atomic_write(file, content, several_writers=True)
    except OSError as error:
        raise ResourceError(
            f"{file}: cannot be written ({error.strerror}). Give another place: hedgehog report {run} --output FILE"
        ) from error
    return file
