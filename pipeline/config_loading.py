"""From a YAML file and `section.key=value` overrides to a RunConfig; every mistake is told, all at once.

Also what is made from a config: a variant's own config, its flat form, differences, the resolved YAML. No torch here.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .config import RunConfig, VariantConfig
from .config_checks import (
    RESERVED_VARIANT_NAMES,
    VARIANT_FIXED_KEYS,
    VARIANT_SECTIONS,
    Problem,
    cross_field_errors,
    untouched,
)
from .config_schema import close_keys, describe_allowed, find_field, show_value, subsections, suggestion, takes_text
from .config_section import COMBINATION, Section
from .errors import ConfigError
from .yaml_reading import YamlDocument, read_yaml

_PATH_KEYS = (
    "output_dir",
    "model.base",
    "model.tokenizer",
    "data.dataset",
    "data.train_file",
    "data.validation_file",
    "data.test_file",
    "engine.deepspeed_config",
)
_MAX_REPAIRS = 4
_SAME: dict[str, tuple[list[Any], Any]] = {
    "tiny.architecture": (["llama"], None),
    "data.kind": (["dialogues"], None),
    "data.dataset_config": ([None], None),
    "data.validation_split": ([None], None),
    "data.test_split": ([None], None),
    "data.text_field": (["text"], None),
    "data.text_end": (["eos"], None),
    "data.second_text_field": ([None], None),
    "data.label_field": (["label"], None),
    "finetune.lora.target_modules": ([None, ["c_attn", "attn.c_proj"]], ["q_proj", "k_proj", "v_proj", "o_proj"]),
}
"""Values that say the same as what runs recorded before there were such (None: they had no such key)."""
_ABSENT = "(not set)"
_NULLS = ("", "null", "~")


@dataclass(frozen=True)
class Conversion:
    """The main conversion or a variant, with defaults where a value could not be used."""

    config: RunConfig
    prefix: str = ""
    """Stands before a variant's keys: `variants.t2r.overrides.`."""
    unknown: tuple[str, ...] = ()
    """Keys whose values could not be used: what follows from their defaults says nothing."""


@dataclass
class Reading:
    """What a file and its overrides hold. `problems` may grow by what later checks find."""

    source: str
    problems: list[Problem]
    origins: dict[str, str]
    """Dotted key to `line 3` or `command line`."""
    conversions: list[Conversion] = field(default_factory=list)
    """The main conversion first; empty where nothing can be made of the file."""

    def valid_config(self) -> RunConfig:
        """
        Raises:
            ConfigError: lists every problem, with its place.
        """
        if self.problems or not self.conversions:
            raise ConfigError(_report(self.source, self.problems, self.origins))
        return self.conversions[0].config


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, put the overrides over it, check everything.

    Args:
        path: a YAML file.
        overrides: `section.key=value`; the value is YAML, and an empty one null. A field that holds text takes it
            literally, unless it is quoted. `variants.x=` removes variant x.

    Raises:
        ConfigError: lists every unknown key (with a suggestion), wrong value and impossible combination.
    """
    return read_config(path, overrides).valid_config()


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Reading:
    """Like `load_config`, but mistakes are handed back, so that others can be told with them.

    Raises:
        ConfigError: the file cannot be read, is not YAML or holds no sections.
    """
    path = Path(path)
    document = _read_file(path)
    problems = [
        Problem((key,), f"given twice, in lines {first} and {later}; keep one.")
        for key, first, later in document.duplicates
    ]
    origins = {key: f"line {line}" for key, line in document.lines.items()}
    raw = document.value if document.value is not None else {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections and keys (`name: …`), got {show_value(raw)}.")
    _anchor_deepspeed_config(raw, path.parent)
    for override in overrides:
        problem = _apply_override(raw, override, origins)
        if problem is not None:
            problems.append(problem)
    _expand_home(raw)
    conversions, found = _validate(raw)
    return Reading(str(path), [*problems, *found], origins, conversions)


def described(problem: Problem, origins: Mapping[str, str]) -> str:
    """`finetune.epochs (line 3): …`: a problem with the place of its key."""
    key = problem.keys[0]
    # given itself, by what stands under it (`modle.base=x`), or with what it stands under
    path = next((name for name in (key, *origins) if name in origins and f"{name}.".startswith(f"{key}.")), key)
    while path and path not in origins:
        path = path.rpartition(".")[0]
    origin = f" ({origins[path]})" if path else ""
    return f"{key}{origin}: {problem.message}"


def apply_variant(config: RunConfig, name: str) -> RunConfig:
    """The config of one variant: its overrides over the main config; `variants` is empty and `label` is the variant's.

    Raises:
        ConfigError: no such variant, or an override that is not allowed or wrong.
    """
    if name not in config.variants:
        known = ", ".join(config.variants) or "none"
        near = difflib.get_close_matches(name, config.variants, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"unknown variant '{name}'{meant}. The config has: {known}")
    variant, problems = _build_variant(Conversion(config), name)
    if problems or variant is None:
        raise ConfigError(_report(f"variant {name}", problems, {}))
    return variant.config


def variant_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Every variant's own config, by name."""
    return {name: apply_variant(config, name) for name in config.variants}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key to JSON value of every leaf. Free mappings (feature_map_options, overrides) are leaves."""
    flat: dict[str, Any] = {}
    _flatten_into(flat, "", config)
    return flat


def canonical(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config as fingerprints are taken of it: keys and defaults that came later are written as what stood for
    them before, so that runs go on that were begun then."""
    found = dict(flat)
    for key, (same, before) in _SAME.items():
        if key in found and found[key] in same:
            del found[key]
            if before is not None:
                found[key] = before
    return found


def config_differences(old: RunConfig | Mapping[str, Any], new: RunConfig | Mapping[str, Any]) -> list[str]:
    """Lines such as `distill.learning_rate: 0.01 → 0.001` for every key that differs; flat mappings do as well."""
    before = flatten(old) if isinstance(old, RunConfig) else dict(old)
    after = flatten(new) if isinstance(new, RunConfig) else dict(new)
    was, is_now = canonical(before), canonical(after)
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        if was.get(key, _ABSENT) == is_now.get(key, _ABSENT):
            continue
        shown = [show_value(values[key]) if key in values else _ABSENT for values in (before, after)]
        lines.append(f"{key}: {shown[0]} → {shown[1]}")
    return lines


def dump_resolved(config: RunConfig) -> str:
    """The whole config as YAML, defaults included; `load_config` of it gives the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def _read_file(path: Path) -> YamlDocument:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, nearby, n=1) or nearby[:5]
        meant = f" {path.parent} has {', '.join(near)}." if near else ""
        raise ConfigError(f"{path}: no such config file.{meant}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a YAML file.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    return read_yaml(text, str(path))


def _apply_override(raw: dict[str, Any], override: str, origins: dict[str, str]) -> Problem | None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        return Problem((override,), "not an override; write section.key=value, for example distill.epochs=2.")
    keys = key.split(".")
    if takes_text(find_field(keys)) and text[:1] not in ("'", '"'):
        value = None if text.strip() in _NULLS else text
    else:
        try:
            value = read_yaml(text, key).value
        except ConfigError as error:
            return Problem((key,), f"on the command line: {str(error).partition(': ')[2]}")
    problem = _set_nested(raw, keys, value)
    origins[key] = "command line"
    return problem


def _set_nested(raw: dict[str, Any], keys: list[str], value: Any) -> Problem | None:
    place = raw
    for depth, name in enumerate(keys[:-1]):
        if place.get(name) is None:
            place[name] = {}
        if not isinstance(place[name], dict):
            above = ".".join(keys[: depth + 1])
            return Problem((".".join(keys),), f"{above} is a value, not a section.")
        place = place[name]
    if keys[0] == "variants" and len(keys) == 2 and value is None:
        place.pop(keys[-1], None)
    else:
        place[keys[-1]] = value
    return None


def _anchor_deepspeed_config(raw: dict[str, Any], folder: Path) -> None:
    """In a file, engine.deepspeed_config is relative to that file; on the command line, to the working directory."""
    engine = raw.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("deepspeed_config"), str):
        engine["deepspeed_config"] = str((folder / Path(engine["deepspeed_config"]).expanduser()).absolute())


def _expand_home(raw: dict[str, Any]) -> None:
    for dotted in _PATH_KEYS:
        *above, last = dotted.split(".")
        place: Any = raw
        for name in above:
            place = place.get(name) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(last), str) and place[last].startswith("~"):
            place[last] = str(Path(place[last]).expanduser())


def _validate(raw: dict[str, Any]) -> tuple[list[Conversion], list[Problem]]:
    """Check fields, then combinations and variants. Where fields are wrong, the rest is checked without them."""
    raw = copy.deepcopy(raw)
    _drop_empty_sections(raw, RunConfig)
    config, problems, unknown = _build(raw)
    if config is None:
        return [], problems
    problems += untouched(cross_field_errors(config), unknown)
    conversions = [Conversion(config, unknown=tuple(unknown))]
    for name in config.variants:
        if name in RESERVED_VARIANT_NAMES or not name.replace("-", "").replace("_", "").isalnum():
            problems.append(
                Problem((f"variants.{name}",), "a variant's name is letters, digits, - and _, and no stage.")
            )
        variant, found = _build_variant(conversions[0], name)
        problems += found
        if variant is not None:
            conversions.append(variant)
    return conversions, problems


def _build(raw: dict[str, Any]) -> tuple[RunConfig | None, list[Problem], list[str]]:
    """Validate; where that fails, tell why, remove what is wrong and try again. Returns the keys that are not known
    then, too."""
    raw = copy.deepcopy(raw)
    problems: list[Problem] = []
    unknown: list[str] = []
    for _ in range(_MAX_REPAIRS):
        try:
            return RunConfig.model_validate(raw), problems, unknown
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["type"] == "missing" and ".".join(map(str, detail["loc"])) in unknown:  # removed here
                    _set_nested(raw, [str(key) for key in detail["loc"]], "unnamed")
                    continue
                loc = [str(key) for key in detail["loc"]]
                given = detail["input"] if isinstance(detail["input"], dict) else {}
                combined = [[*loc, key] for key in detail.get("ctx", {}).get("keys", ()) if key in given]
                for at in combined or [loc]:
                    _remove(raw, at)
                    unknown.append(".".join(at))
                if detail["type"] == "missing":
                    _set_nested(raw, loc, "unnamed")
                if detail["type"] == "extra_forbidden":
                    unknown += close_keys(".".join(loc))  # it was meant for one of them
                problems.append(Problem((".".join((combined or [loc])[0]) or "the config",), _explain(detail, loc)))
    return None, problems, unknown


def _explain(detail: Any, loc: list[str]) -> str:
    field = find_field(loc)
    if detail["type"] == "extra_forbidden":
        return f"unknown key; {suggestion('.'.join(loc))}"
    if detail["type"] == "missing":
        return f"missing; expected {describe_allowed(field) if field else 'a value'}."
    if detail["type"] == COMBINATION:
        return f"{detail['msg']}."
    if detail["type"] == "value_error":
        got = "" if isinstance(detail["input"], (dict, Section)) else f", got {show_value(detail['input'])}"
        return f"{detail['ctx']['error']}{got}."
    if field is None and loc[:1] == ["variants"] and len(loc) == 2:
        return f"expected a section with {' and '.join(VariantConfig.model_fields)}, got {show_value(detail['input'])}."
    if field is None:  # an item of a list
        return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, got {show_value(detail['input'])}."
    return (
        f"expected {describe_allowed(field)}, got {show_value(detail['input'])}{_quote_hint(field, detail['input'])}."
    )


def _quote_hint(field: Any, value: Any) -> str:
    if takes_text(field) and isinstance(value, (bool, int, float)):
        return " (put text that looks like a number in quotes)"
    if isinstance(value, str) and not takes_text(field):
        try:
            float(value)
        except ValueError:
            return ""
        return " (without the quotes it is a number)"
    return ""


def _build_variant(main: Conversion, name: str) -> tuple[Conversion | None, list[Problem]]:
    config, variant = main.config, main.config.variants[name]
    prefix = f"variants.{name}.overrides."
    raw = config.model_dump()
    raw["variants"], raw["label"] = {}, variant.label or name
    problems = []
    for key, value in _dotted(variant.overrides):
        section = key.partition(".")[0]
        if section not in VARIANT_SECTIONS:
            message = f"a variant may differ in {', '.join(VARIANT_SECTIONS)} only."
            if not any(section == field for field in RunConfig.model_fields):
                message = f"unknown key; {suggestion(section)}"
            problems.append(Problem((prefix + key,), message))
        elif key in VARIANT_FIXED_KEYS:
            problems.append(
                Problem((prefix + key,), "all variants share the base model; make another run for another.")
            )
        else:
            problem = _set_nested(raw, key.split("."), copy.deepcopy(value))
            if problem is not None:
                problems.append(Problem((prefix + key,), problem.message))
    built, found, own = _build(raw)
    if built is not None:
        already = {str(problem) for problem in cross_field_errors(config)}
        new = [problem for problem in cross_field_errors(built) if str(problem) not in already]
        found += untouched(new, [*main.unknown, *own])
    problems += [problem.under(prefix) for problem in found]
    conversion = None if built is None else Conversion(built, prefix, (*main.unknown, *own))
    return conversion, problems


def _dotted(overrides: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(dotted key, value) of overrides written as dotted keys, nested sections, or both."""
    pairs: list[tuple[str, Any]] = []
    for key, value in overrides.items():
        field = find_field(str(key).split("."))
        is_section = str(key) in RunConfig.model_fields or (field is not None and field.annotation in _SECTION_CLASSES)
        if isinstance(value, Mapping) and is_section:
            pairs += [(f"{key}.{inner}", item) for inner, item in value.items()]
        else:
            pairs.append((str(key), value))
    return pairs if pairs == list(overrides.items()) else _dotted(dict(pairs))


_SECTION_CLASSES = {inner for inner, _ in subsections(RunConfig).values()} | {
    inner for section, _ in subsections(RunConfig).values() for inner, _ in subsections(section).values()
}


def _drop_empty_sections(raw: dict[str, Any], section: type[Section]) -> None:
    """`finetune:` with nothing under it means its defaults."""
    for name, (inner, nullable) in subsections(section).items():
        if name in raw and raw[name] is None and not nullable:
            del raw[name]
        elif isinstance(raw.get(name), dict):
            _drop_empty_sections(raw[name], inner)
    if section is RunConfig and "variants" in raw and raw["variants"] is None:
        del raw["variants"]


def _remove(raw: Any, loc: Iterable[str]) -> None:
    """Remove a key, or the field that holds a list's item."""
    *above, last = loc
    place, parents = raw, []
    for name in above:
        if not isinstance(place, dict) or name not in place:
            break
        parents.append((place, name))
        place = place[name]
    if isinstance(place, dict) and last in place:
        del place[last]
    elif parents:
        parent, name = parents[-1]
        parent.pop(name, None)


def _report(source: str, problems: Sequence[Problem], origins: Mapping[str, str]) -> str:
    return listed(source, list(dict.fromkeys(described(problem, origins) for problem in problems)))


def listed(source: str, lines: Sequence[str]) -> str:
    """One message of all mistakes: a single one in a line with the file's name, several indented below it."""
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    indented = [line.replace("\n", "\n    ") for line in lines]
    return f"{source}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in indented)


def _flatten_into(flat: dict[str, Any], prefix: str, section: Section) -> None:
    values = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            _flatten_into(flat, f"{prefix}{name}.", value)
        elif isinstance(value, dict) and value and all(isinstance(item, Section) for item in value.values()):
            for key, item in value.items():
                _flatten_into(flat, f"{prefix}{name}.{key}.", item)
        else:
            flat[prefix + name] = values[name]
