"""YAML as a config needs it: keys keep their line numbers, a key given twice is a fault, and 3e-3 is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import ConfigError

_FLOAT_TAG = "tag:yaml.org,2002:float"
_TIMESTAMP_TAG = "tag:yaml.org,2002:timestamp"
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_WHOLE = re.compile(r"[-+]?[0-9_]+")


@dataclass
class YamlDocument:
    """A parsed file: its value, the line of every key by dotted path, and the keys that were given twice."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    """Dotted path to line, from 1."""
    duplicates: list[tuple[str, int, int]] = field(default_factory=list)
    """(dotted path, first line, later line)."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats (PyYAML reads 3e-3 as text) and without dates (a name may look like one)."""


class _FloatPattern:
    """What PyYAML needs of a regular expression: `match` of the whole scalar. Whole numbers stay integers."""

    def match(self, text: str) -> bool:
        return _FLOAT.fullmatch(text) is not None and _WHOLE.fullmatch(text) is None


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT_TAG, _TIMESTAMP_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_FLOAT_TAG, _FloatPattern(), list("-+0123456789."))


def read_yaml(text: str, name: str) -> YamlDocument:
    """Parse one YAML document; tags that would build Python objects are refused.

    Args:
        text: the document.
        name: what to call it in errors.

    Raises:
        ConfigError: not valid YAML; the message names the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = YamlDocument(None)
        if node is not None:
            _record_keys(node, "", document, set())
            document.value = loader.construct_document(node)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        begun = (
            f"{error.context} (begun in line {error.context_mark.line + 1})" if error.context_mark else error.context
        )
        detail = " ".join(part for part in (begun, error.problem) if part)
        raise ConfigError(f"{name}{line}: not valid YAML: {detail}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _record_keys(node: yaml.Node, prefix: str, document: YamlDocument, above: set[int]) -> None:
    if id(node) in above:  # an alias to a node that it stands in
        return
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_keys(item, f"{prefix}.{index}", document, above | {id(node)})
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            path = f"{prefix}.{key.value}" if prefix else str(key.value)
            line = key.start_mark.line + 1
            if path in seen and key.value != "<<":
                document.duplicates.append((path, seen[path], line))
            seen.setdefault(path, line)
            document.lines[path] = line
            _record_keys(value, path, document, above | {id(node)})
