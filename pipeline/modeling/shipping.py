"""Puts the modeling files beside exported weights, so that plain transformers loads them without this project.

The files lie flat in the export folder: `from ...kernels.feature_maps import X` becomes `from .feature_maps import X`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path

from .architecture import Architecture, architecture

_ALLOWED_PACKAGES = {"torch", "transformers"}
_RELATIVE_IMPORT = re.compile(r"^from (?P<dots>\.+)(?P<module>[\w.]+) import ", re.MULTILINE)


def ship_modeling_files(folder: str | os.PathLike) -> list[str]:
    """Copy what the model needs into `folder`, imports rewritten, and enter it in config.json's auto_map.

    `folder` is one that save_pretrained has filled. Returns the names of the files written, config.json included.
    Raises FileNotFoundError without a config.json, and ValueError if the modeling files import anything but torch,
    transformers, the standard library and each other.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    of_family = architecture(str(config["model_type"]).removeprefix("hedgehog_"))
    sources = modeling_sources(of_family)
    for name, source in sources.items():
        (folder / name).write_text(source, encoding="utf-8")
    config["auto_map"] = of_family.auto_map
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*sources, config_file.name]


def modeling_sources(of_family: Architecture) -> dict[str, str]:
    """{file name: source} of the configuration, the model and all that they import from this project, flat."""
    waiting = [Path(str(module.__file__)) for module in of_family.modeling_files]
    origins: dict[str, Path] = {}
    sources: dict[str, str] = {}
    while waiting:
        file = waiting.pop(0)
        if file.name in origins:
            if origins[file.name] != file:
                raise ValueError(f"two files called {file.name} cannot lie flat in one folder")
            continue
        origins[file.name] = file
        source = file.read_text(encoding="utf-8")
        for match in _RELATIVE_IMPORT.finditer(source):
            package = file.parents[len(match["dots"]) - 1]
            waiting.append(package.joinpath(*match["module"].split(".")).with_suffix(".py"))
        sources[file.name] = _RELATIVE_IMPORT.sub(_flat_import, source)
    for name, source in sources.items():
        _check_imports(name, source, known={Path(other).stem for other in sources})
    return sources


def _flat_import(match: re.Match[str]) -> str:
    return f"from .{match['module'].split('.')[-1]} import "


def _check_imports(name: str, source: str, known: set[str]) -> None:
    """ValueError for an import that an export could not resolve, wherever in the file it stands."""
    allowed = _ALLOWED_PACKAGES | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [(alias.name, alias.name.split(".")[0] in allowed) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported = [(node.module, (node.module or "").split(".")[0] in allowed)]
        elif isinstance(node, ast.ImportFrom):
            imported = [("." * node.level + (node.module or ""), node.level == 1 and node.module in known)]
        else:
            continue
        for module, resolves in imported:
            if not resolves:
                raise ValueError(f"{name}: import of {module} would fail in an exported folder")


__all__ = ["modeling_sources", "ship_modeling_files"]
