"""A pretended Slurm on the path: sbatch hands out ids, squeue and sacct say what a file says, scancel takes note."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hedgehog.pipeline.manifest import Manifest

_PROGRAM = """\
#!{python}
import json, os, sys
from pathlib import Path
state = Path({state!r})
facts = json.loads(state.read_text())
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
facts["calls"].append([name, *arguments])
if name in facts["fails"] and (facts["fails"][name].get("if", "") in " ".join(arguments)):
    state.write_text(json.dumps(facts))
    sys.stderr.write(facts["fails"][name]["words"] + "\\n")
    sys.exit(1)
if name == "sbatch":
    facts["next_id"] += 1
    job = str(facts["next_id"])
    array = [a for a in arguments if a.startswith("--array=")]
    indices = []
    for span in (array[0][8:].split("%")[0].split(",") if array else []):
        first, _, last = span.partition("-")
        indices += range(int(first), int(last or first) + 1)
    facts["environment"] = dict(os.environ)
    comment = [a[10:] for a in arguments if a.startswith("--comment=")]
    facts["comments"][job] = comment[0] if comment else ""
    lines = Path(arguments[-1]).read_text().splitlines()
    facts["names"][job] = [line[19:] for line in lines if line.startswith("#SBATCH --job-name=")][-1]
    for index in indices or [None]:
        facts["jobs"][job if index is None else f"{{job}}_{{index}}"] = ["PENDING", "Dependency"]
    if facts["loses_answer"]:
        state.write_text(json.dumps({{**facts, "loses_answer": False}}))
        sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(job)
elif name == "squeue":
    for job, (word, reason) in facts["jobs"].items():
        number, _, index = job.partition("_")
        if word not in facts["only_in_sacct"]:
            by_comment = "--format=%F|%k" in arguments
            name, comment = facts["names"][number], facts["comments"][number]
            fields = [number, index or "N/A", word, reason, name, comment]
            print("|".join([number, comment] if by_comment else fields))
    for job, word in facts["after_a_look"].items():
        facts["jobs"][job] = [word, ""]
    facts["after_a_look"] = {{}}
elif name == "sacct":
    for job, (word, reason) in facts["jobs"].items():
        name = facts["names"][job.partition("_")[0]]
        print("|".join([job, word, "2:0" if word == "FAILED" else "0:0", name]))
elif name == "scancel":
    for job in arguments:
        facts["jobs"][job] = ["CANCELLED", ""]
state.write_text(json.dumps(facts))
"""


class FakeSlurm:
    """The pretended Slurm's memory."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "slurm.json"
        self.bin = folder / "bin"
        self.bin.mkdir()
        facts = {"calls": [], "jobs": {}, "fails": {}, "next_id": 100, "only_in_sacct": []}
        facts |= {"comments": {}, "names": {}, "environment": {}, "loses_answer": False, "after_a_look": {}}
        self._state.write_text(json.dumps(facts))
        for name in ("sbatch", "squeue", "sacct", "scancel"):
            program = self.bin / name
            program.write_text(_PROGRAM.format(python=sys.executable, state=str(self._state)))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def _facts(self) -> dict[str, Any]:
        return json.loads(self._state.read_text())

    def _change(self, key: str, value: Any) -> None:
        self._state.write_text(json.dumps({**self._facts(), key: value}))

    def calls(self, name: str) -> list[list[str]]:
        """Arguments of every call of a command."""
        return [call[1:] for call in self._facts()["calls"] if call[0] == name]

    def set(self, **states: str) -> None:
        """`set(_102_0="FAILED")`: what squeue and sacct will say; an empty word forgets the job."""
        jobs = self._facts()["jobs"]
        for key, word in states.items():
            jobs[key.removeprefix("_")] = [word, "None"]
            if not word:
                del jobs[key.removeprefix("_")]
        self._change("jobs", jobs)

    def belongs_to_somebody_else(self, *jobs: str, name: str = "theirs", comment: str = "theirs") -> None:
        """Let squeue and sacct show other jobs under these ids, as those of another cluster do."""
        self._change("names", {**self._facts()["names"], **dict.fromkeys(jobs, name)})
        self._change("comments", {**self._facts()["comments"], **dict.fromkeys(jobs, comment)})

    def lose_next_answer(self) -> None:
        """Let the next sbatch place its job and then say that it heard nothing."""
        self._change("loses_answer", True)

    def after_a_look(self, **states: str) -> None:
        """States as in `set`, which come true once squeue was asked."""
        self._change("after_a_look", {key.removeprefix("_"): word for key, word in states.items()})

    @property
    def environment(self) -> dict[str, str]:
        """What the newest sbatch that placed a job saw."""
        return self._facts()["environment"]

    def only_in_sacct(self, *words: str) -> None:
        """States that squeue has forgotten."""
        self._change("only_in_sacct", list(words))

    def fail(self, name: str, words: str, where: str = "") -> None:
        """Let a command refuse (where its arguments hold `where`) with these words."""
        self._change("fails", {**self._facts()["fails"], name: {"words": words, "if": where}})

    def works_again(self) -> None:
        self._change("fails", {})

    def submissions(self) -> dict[str, dict[str, str]]:
        """Name of each job that sbatch was asked for to its options."""
        found = {}
        for *options, script in self.calls("sbatch"):
            given = dict(option.removeprefix("--").split("=", 1) for option in options if "=" in option)
            given.pop("comment", None)  # unique to each call
            found[Path(script).stem] = given
        return found

    def forget_calls(self) -> None:
        self._change("calls", [])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


VALUES: dict[str, Any] = {
    "name": "trial",
    "tiny": {"num_layers": 8},
    "distill": {"max_steps": 4, "global_batch_size": 4},
    "finetune": {"global_batch_size": 4},
    "variants": {"soft": {"overrides": {"model.attention": "softmax"}}},
    "slurm": {"gpus": 2, "layer_groups": 3, "time": "01:00:00", "account": "proj"},
}


@pytest.fixture
def write_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write_config(slurm={...})`: trial.yaml in an empty working directory, with these keys of sections changed."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)

    def write(**sections: Any) -> Path:
        values = dict(VALUES)
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes} if isinstance(changes, dict) else changes
        file = Path("trial.yaml")
        file.write_text(yaml.safe_dump(values))
        return file

    write()
    return write


@pytest.fixture
def finish() -> Callable[..., Path]:
    """`finish("distill/layers-0-1")`: a finished stage in the run folder (`status="running"` for a begun one)."""

    def make(place: str, run: str = "trial", **fields: Any) -> Path:
        folder = Path("runs") / run / place
        folder.mkdir(parents=True, exist_ok=True)
        stage = next(part for part in reversed(place.split("/")) if not part.startswith(("layers-", "shard-")))
        Manifest(stage=stage, fingerprint="f", **{"status": "done", "config": {}, **fields}).write(folder)
        (folder / "something").write_text("")
        return folder

    return make
