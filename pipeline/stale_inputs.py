"""Whether a stage was made from what its inputs hold now: manifests alone are compared. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .errors import CheckpointError
from .manifest import Manifest, read_manifest
from .run_folder import MAIN, SHARED_STAGES, STAGES, RunFolder


def changed_inputs(folder: RunFolder, manifest: Manifest, variant: str | None) -> tuple[str, ...]:
    """Titles (`distill`, `t2r/finetune`) of the finished stages that ran anew since this one consumed them.

    A stage that had nothing to do is the same whatever it would have consumed: none. An input that is not finished,
    or whose manifest cannot be read, says nothing yet.
    """
    if manifest.skipped:
        return ()
    found = []
    for stage, own, digest in _sources(manifest, variant):
        try:
            now = read_manifest(folder.stage(stage, own))
        except CheckpointError:
            continue
        if now is not None and now.status == "done" and now.output_fingerprint != digest:
            found.append(stage if own is None else f"{own}/{stage}")
    return tuple(dict.fromkeys(found))


def _sources(manifest: Manifest, variant: str | None) -> Iterator[tuple[str, str | None, str]]:
    """Stage, variant and fingerprint of what was consumed of the run itself."""
    for source, digest in manifest.consumed.items():
        name, _, stage = source.rpartition("/")
        if stage in STAGES:  # else a file from outside the run
            given = name or variant
            yield stage, None if stage in SHARED_STAGES or given == MAIN else given, digest


def outdated_stages(
    folder: RunFolder, stages: Iterable[tuple[str, str | None, str | None]]
) -> dict[tuple[str, str | None, str | None], tuple[str, ...]]:
    """Of these (stage, variant, layers), in the order of the run: those that were made from what is not there any
    more, and why; those that only follow from such a one have no reason of their own.

    Raises:
        CheckpointError: a manifest cannot be read.
    """
    found: dict[tuple[str, str | None, str | None], tuple[str, ...]] = {}
    for stage, variant, layers in stages:
        manifest = read_manifest(folder.stage(stage, variant, layers))
        if manifest is None or manifest.skipped:
            continue
        changed = changed_inputs(folder, manifest, variant)
        follows = any((source, own, None) in found for source, own, _ in _sources(manifest, variant))
        if changed or follows:
            found[stage, variant, layers] = changed
    return found
