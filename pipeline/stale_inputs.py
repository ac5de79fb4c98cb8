"""Whether stages were made from what their inputs hold now: manifests alone are compared. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from .errors import CheckpointError
from .manifest import Manifest, read_manifest
from .run_folder import MAIN, SHARED_STAGES, STAGES, RunFolder


class Place(NamedTuple):
    """A stage of the main conversion (None) or of a variant, or a subset of its layers."""

    stage: str
    variant: str | None
    layers: str | None = None

    @property
    def title(self) -> str:
        """`distill`, `t2r/finetune`, `distill/0-15`."""
        return "/".join(part for part in (self.variant, self.stage, self.layers) if part)


class Outdated(NamedTuple):
    """Why a stage is out of date."""

    anew: tuple[Place, ...]
    """Inputs that ran anew since, or are not finished again."""
    follows: bool
    """Whether an input is out of date itself."""


def outdated_stages(wanted: Iterable[Place], manifests: Mapping[Place, Manifest]) -> dict[Place, Outdated]:
    """Those of the stages, in the order of a run, that were made from what is not there any more.

    What had nothing to do is the same whatever it would have consumed, and never out of date.

    Args:
        manifests: of all stages that have begun.
    """
    found: dict[Place, Outdated] = {}
    for place in wanted:
        manifest = manifests[place]
        if manifest.skipped:
            continue
        anew, follows = [], False
        for source, digest in _inputs(manifest, place.variant):
            given = manifests.get(source)
            if given is None:
                continue
            if source in found:
                follows = True
            elif given.status != "done" or given.output_fingerprint != digest:
                anew.append(source)
        if anew or follows:
            found[place] = Outdated(tuple(dict.fromkeys(anew)), follows)
    return found


def changed_inputs(folder: RunFolder, manifest: Manifest, variant: str | None) -> tuple[str, ...]:
    """Titles of the finished stages that ran anew since this one consumed them.

    An input that is not finished, or whose manifest cannot be read, says nothing yet: it may end as it was.
    """
    found = []
    for source, digest in () if manifest.skipped else _inputs(manifest, variant):
        try:
            now = read_manifest(folder.stage(source.stage, source.variant))
        except CheckpointError:
            continue
        if now is not None and now.status == "done" and now.output_fingerprint != digest:
            found.append(source.title)
    return tuple(dict.fromkeys(found))


def _inputs(manifest: Manifest, variant: str | None) -> Iterator[tuple[Place, str]]:
    """What was consumed of the run itself, and its fingerprint then: `distill` is that of the same conversion,
    `t2r/distill` a variant's."""
    for source, digest in manifest.consumed.items():
        name, _, stage = source.rpartition("/")
        if stage in STAGES:  # else a file from outside the run
            given = name or variant
            yield Place(stage, None if stage in SHARED_STAGES or given == MAIN else given), digest
