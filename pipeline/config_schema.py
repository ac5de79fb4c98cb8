"""What the config's schema knows about its keys: which exist, what they may hold, and which one a typo meant."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .config import RunConfig, Section, VariantConfig

_SAME_SECTION_CUTOFF = 0.7
_ANY_SECTION_CUTOFF = 0.8
_MAX_SUGGESTIONS = 3
_MAX_SHOWN_CHARACTERS = 60
_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "a mapping (key: value)",
    tuple: "a list",
}
_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def section_class(annotation: Any) -> type[Section] | None:
    """The section that an annotation stands for (`X` or `X | None`), or None for anything else."""
    for kind in _kinds(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def subsections(section: type[Section]) -> dict[str, tuple[type[Section], bool]]:
    """Name to (class, may be null) of the sections inside a section."""
    found = {}
    for name, field in section.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None:
            found[name] = (inner, type(None) in _kinds(field.annotation))
    return found


def find_field(path: Sequence[str]) -> FieldInfo | None:
    """The schema's field at a path of keys, or None: an unknown key, or a key inside a free mapping."""
    section: type[Section] | None = RunConfig
    field = None
    keys = list(path)
    while keys:
        if section is None:
            return None
        field = section.model_fields.get(keys.pop(0))
        if field is None:
            return None
        section = section_class(field.annotation)
        values = get_args(field.annotation)
        if get_origin(field.annotation) is dict and keys and section_class(values[1]):
            section = section_class(values[1])
            keys.pop(0)
            field = None
    return field


def takes_text(field: FieldInfo | None) -> bool:
    """Whether a field may hold a string."""
    return field is not None and str in _kinds(field.annotation)


def describe_allowed(field: FieldInfo) -> str:
    """What a field may hold, in words: `a whole number ≥ 1 or null`."""
    names = []
    for kind in _kinds(field.annotation):
        origin = get_origin(kind) or kind
        if origin is Literal:
            names.append("one of " + ", ".join(str(choice) for choice in get_args(kind)))
        elif isinstance(origin, type) and issubclass(origin, Section):
            names.append("a section (keys under it)")
        elif kind is not type(None):
            names.append(_KIND_NAMES.get(origin, "a value"))
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in _BOUNDS
        if getattr(constraint, name, None) is not None
    ]
    text = " or ".join(names) + (" " + " and ".join(bounds) if bounds else "")
    if any(getattr(constraint, "pattern", None) for constraint in field.metadata):
        text += f" ({(field.description or '').rstrip('.')})"
    return text + (" or null" if type(None) in _kinds(field.annotation) else "")


def show_value(value: Any) -> str:
    """A config value as a user would write it, cut where it is long."""
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return shown if len(shown) <= _MAX_SHOWN_CHARACTERS else shown[: _MAX_SHOWN_CHARACTERS - 1] + "…"


@cache
def dotted_keys() -> tuple[str, ...]:
    """Every key of the schema as a dotted path, sections included, in the schema's order."""
    return tuple(_walk(RunConfig, ""))


def suggestion(path: str) -> str:
    """How to go on after an unknown key: `did you mean finetune.lora.rank?`, or the keys that there are."""
    keys = path.split(".")
    if keys[0] == "variants" and len(keys) > 2:
        return f"a variant has the keys {', '.join(VariantConfig.model_fields)}."
    matches = close_keys(path)
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    section = _deepest_section(path)
    siblings = [key for key in dotted_keys() if key.rpartition(".")[0] == section]
    place = section or "the top level"
    return f"{place} has the keys {', '.join(key.rpartition('.')[2] for key in siblings)}."


def close_keys(path: str) -> list[str]:
    """The keys that an unknown one may have been meant for."""
    section, _, last = path.rpartition(".")
    # finetune.lora_rank and finetune.lora.rank are the same words
    same_words = [key for key in dotted_keys() if _words(key) == _words(path) and key != path]
    if same_words:
        return same_words[:1]
    siblings = {key.rpartition(".")[2]: key for key in dotted_keys() if key.rpartition(".")[0] == section}
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=_SAME_SECTION_CUTOFF)
    if near:
        return [siblings[near[0]]]
    if section and section not in dotted_keys():
        near_path = difflib.get_close_matches(path, dotted_keys(), n=1, cutoff=_ANY_SECTION_CUTOFF)
        if near_path:
            return near_path
    same_name = [key for key in dotted_keys() if key.rpartition(".")[2] == last]
    if same_name:
        return same_name[:_MAX_SUGGESTIONS]
    near_names = difflib.get_close_matches(
        last, {key.rpartition(".")[2] for key in dotted_keys()}, n=1, cutoff=_ANY_SECTION_CUTOFF
    )
    return [key for key in dotted_keys() if near_names and key.rpartition(".")[2] == near_names[0]][:_MAX_SUGGESTIONS]


def _words(path: str) -> str:
    return path.replace(".", "_").replace("-", "_").lower()


def _deepest_section(path: str) -> str:
    section = path.rpartition(".")[0]
    while section and section not in dotted_keys():
        section = section.rpartition(".")[0]
    return section


def _walk(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{name}.")


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)
