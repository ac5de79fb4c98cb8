"""`submit --sweep`: the same config with several sets of overrides, a run folder for each.

    grid:                          # every combination
      seed: [0, 1, 2]
      model.feature_map: [hedgehog_softmax, hedgehog_exp]

or

    runs:                          # one after the other; `name` is put behind the config's own
      - {name: slow, finetune.learning_rate: 1e-5}
      - {seed: 1}

and, with either or alone, further configs that go the same way as the one on the command line:

    configs: [configs/llama2-7b-samsum.yaml]
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config_loading import load_config
from ..errors import ConfigError
from ..yaml_reading import read_yaml


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    config: str
    """The YAML."""
    overrides: tuple[str, ...]
    """What it differs in, its `name` included."""
    described: str
    """The differences for messages."""


def read_sweep(file: Path, config_path: str, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """The runs of a sweep, each with a name (and so a folder) of its own.

    Raises:
        ConfigError: the file is no sweep, a set of overrides is wrong, or two runs have the same name.
    """
    try:
        document = read_yaml(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the sweep cannot be read ({error}).") from None
    if document.duplicates:
        key, first, later = document.duplicates[0]
        raise ConfigError(f"{file}: {key}: given twice, in lines {first} and {later}; keep one.")
    others, sets = _axes(document.value, file)
    runs: list[SweepRun] = []
    owners: dict[Path, SweepRun] = {}
    for path, values in itertools.product(dict.fromkeys([config_path, *others]), sets):
        values = dict(values)
        suffix = values.pop("name", None)
        described = ", ".join(f"{key}={_as_text(value)}" for key, value in values.items())
        name = load_config(path, overrides).name
        if suffix is not None or values:
            name += f"-{_slug(str(suffix) if suffix is not None else described)}"
        given = tuple(f"{key}={_as_text(value)}" for key, value in values.items())
        described = described or f"name: {name}"
        run = SweepRun(path, (*given, f"name={name}"), f"{path}: {described}" if others else described)
        try:
            config = load_config(path, [*overrides, *run.overrides])  # every fault is told before a job is submitted
        except ConfigError as error:
            raise ConfigError(f"{file}: {run.described}: {error}") from None
        folder = (Path(config.output_dir) / config.name).absolute()
        _check_folder(folder, run, owners, file)
        owners[folder] = run
        runs.append(run)
    return runs


def _check_folder(folder: Path, run: SweepRun, owners: dict[Path, SweepRun], file: Path) -> None:
    """
    Raises:
        ConfigError: the folder is another run's, or would be where names that differ in case are one, or lies in one.
    """
    for other, owner in owners.items():
        both = f"({owner.described}) and ({run.described})"
        if str(folder).casefold() == str(other).casefold():
            where = f"the folder {folder}" if folder == other else f"{other} and {folder} where case does not count"
            raise ConfigError(
                f"{file}: two runs would share {where}: {both}. Give them different names with a `name` key under "
                "`runs`."
            )
        if folder in other.parents or other in folder.parents:
            raise ConfigError(f"{file}: {max(folder, other)} lies in another run's folder: {both}. Change output_dir.")


def _axes(value: Any, file: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Further configs, and the sets of overrides for each of them and for the one on the command line."""
    others = value.get("configs", []) if isinstance(value, dict) else []
    if not isinstance(others, list) or not all(isinstance(path, str) for path in others):
        raise ConfigError(f"{file}: configs: expected a list of YAML files such as [configs/tiny.yaml].")
    if not others:
        return [], _override_sets(value, file)
    rest = {key: content for key, content in value.items() if key != "configs"}
    return others, _override_sets(rest, file) if rest else [{}]


def _override_sets(value: Any, file: Path) -> list[dict[str, Any]]:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in ("grid", "runs"):
        raise ConfigError(
            f"{file}: a sweep is one key, `grid` (lists of values: every combination) or `runs` (a list of sets of "
            "overrides such as {seed: 1}), and `configs` (further YAML files) beside it or alone."
        )
    kind, content = next(iter(value.items()))
    if kind == "grid":
        if not isinstance(content, dict) or not content:
            raise ConfigError(f"{file}: grid: expected keys with lists of values, such as seed: [0, 1].")
        for key, choices in content.items():
            if not isinstance(choices, list) or not choices:
                raise ConfigError(f"{file}: grid.{key}: expected a list of values such as [0, 1].")
        combinations = itertools.product(*content.values())
        return [dict(zip(map(str, content), combination, strict=True)) for combination in combinations]
    if not isinstance(content, list) or not content:
        raise ConfigError(f"{file}: runs: expected a list of sets of overrides, such as - {{seed: 1}}.")
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not entry:
            raise ConfigError(f"{file}: runs, entry {number + 1}: expected keys and values, such as {{seed: 1}}.")
    return [{str(key): item for key, item in entry.items()} for entry in content]


def _as_text(value: Any) -> str:
    """As an override on the command line writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _slug(text: str) -> str:
    """A set of overrides as part of a folder's name: `seed=1, model.feature_map=elu` is `seed1-feature_map_elu`."""
    words = []
    for part in text.split(", "):
        key, equals, value = part.partition("=")
        last = key.rpartition(".")[2]
        words.append(f"{last}{'' if value[:1].isdigit() else '_'}{value}" if equals else part)
    return re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words)).strip("_-") or "run"
