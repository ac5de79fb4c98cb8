"""How the run was made, to make it again: config, commands, versions, fingerprints. All of it folds away."""

from __future__ import annotations

from ..formatting import format_bytes
from ..go_on import shown
from .blocks import folded, section, table
from .markup import Markup, joined, tag
from .run_files import RunFiles


def provenance(run: RunFiles) -> Markup:
    """The section."""
    return section(
        "provenance",
        "How it was made",
        _config(run),
        _commands(run),
        _versions(run),
        _fingerprints(run),
        _artifacts(run),
    )


def _config(run: RunFiles) -> Markup | None:
    try:
        text = run.folder.config_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return folded("Config, with every default", tag("pre", text))


def _commands(run: RunFiles) -> Markup:
    stages: dict[str, list[str]] = {}
    for files in run.begun:
        if files.manifest.command:
            stages.setdefault(shown(files.manifest.command), []).append(files.status.title)
    rows = [[tag("code", command), _all_or_some(titles, run)] for command, titles in stages.items()]
    return folded("Commands", table(("command", "newest attempt of"), rows, caption="Commands", num_texts=2))


def _versions(run: RunFiles) -> Markup:
    """A column for every set of versions: most runs have one."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for files in run.begun:
        sets.setdefault(tuple(sorted(files.manifest.versions.items())), []).append(files.status.title)
    packages = dict.fromkeys(package for versions in sets for package, _ in versions)
    rows = [[package, *(dict(versions).get(package, "–") for versions in sets)] for package in packages]
    columns = ("package", *(_all_or_some(titles, run) for titles in sets.values()))
    return folded("Versions", table(columns, rows, caption="Versions of packages", num_texts=len(columns)))


def _fingerprints(run: RunFiles) -> Markup:
    rows = [
        [
            files.status.title,
            _time(files.manifest.started_at),
            _time(files.manifest.finished_at),
            _digest(files.manifest.fingerprint),
            _digest(files.manifest.output_fingerprint) if files.manifest.status == "done" else "–",
        ]
        for files in run.begun
    ]
    columns = ("stage", "began (UTC)", "ended (UTC)", "of config and inputs", "of the result")
    return folded("Times and fingerprints", table(columns, rows, caption="Times and SHA-256", num_texts=len(columns)))


def _artifacts(run: RunFiles) -> Markup:
    rows = [
        [joined(files.status.title, ": ", name), format_bytes(artifact.num_bytes), _digest(artifact.sha256)]
        for files in run.begun
        for name, artifact in files.manifest.artifacts.items()
    ]
    return folded("Artifacts", table(("artifact", "size", "SHA-256"), rows, caption="Artifacts", num_texts=3))


def _all_or_some(titles: list[str], run: RunFiles) -> str:
    return "all stages" if len(titles) == len(run.begun) else ", ".join(titles)


def _time(iso: str | None) -> str:
    return "–" if not iso else iso[:16].replace("T", " ")


def _digest(sha256: str) -> Markup:
    return tag("code", sha256, class_="digest")
