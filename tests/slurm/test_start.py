"""When the tests of this folder are skipped, and when a Slurm that does not start fails them. Without any Slurm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("exit_code", "ci", "outcome"),
    [
        (0, "true", None),
        (77, "", pytest.skip.Exception),
        (77, "true", pytest.fail.Exception),
        (1, "", pytest.fail.Exception),
        (1, "true", pytest.fail.Exception),
    ],
)
def test_only_a_machine_that_cannot_have_slurm_skips(
    exit_code: int, ci: str, outcome: type[BaseException] | None, start: Callable[..., None], tmp_path: Path
):
    script = tmp_path / "local-slurm"
    script.write_text(f"#!/bin/sh\necho that is why >&2\nexit {exit_code}\n")
    script.chmod(0o755)
    with contextlib.nullcontext() if outcome is None else pytest.raises(outcome, match="that is why"):
        start(script, {"CI": ci})
