"""Which stages were made from what is not there any more: an input ran anew since, or is out of date itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..go_on import commands_to_renew, shown
from ..run_folder import MAIN, STAGES
from ..stale_inputs import Place, outdated_stages
from .run_files import RunFiles, StageFiles


@dataclass(frozen=True)
class Stale:
    """What is out of date: stages in order, why the first of them are, and how they are made again."""

    first: dict[str, tuple[str, ...]]
    """Title to its inputs that ran anew since, of stages whose inputs themselves are up to date."""
    titles: tuple[str, ...]
    """Of all, those that only follow too."""
    commands: tuple[str, ...]
    """Which make all of them again, in this order."""
    input_unfinished: bool
    """Whether one of these inputs is not finished, and so comes before the commands."""

    @property
    def following(self) -> tuple[str, ...]:
        """Titles of those that are made of the first, and of nothing else that changed."""
        return tuple(title for title in self.titles if title not in self.first)

    def reasons(self) -> str:
        """`finetune (distill ran anew since)`, of all the first."""
        return "; ".join(f"{title} ({' and '.join(anew)} ran anew since)" for title, anew in self.first.items())


def find_stale(run: RunFiles) -> Stale:
    """Compare what every stage consumed with what its inputs hold now; the order of stages is that of inputs."""
    begun = {_place(files): files for files in run.begun if files.status.shard is None}
    manifests = {place: files.manifest for place, files in begun.items()}
    outdated = outdated_stages((_place(files) for files in _in_question(run)), manifests)
    first = {
        place.title: tuple(source.title for source in why.anew) for place, why in outdated.items() if not why.follows
    }
    commands = commands_to_renew(run.folder, run.config, [begun[place].status for place in outdated])
    return Stale(
        first,
        tuple(place.title for place in outdated),
        tuple(shown(command) for command in commands),
        any(manifests[source].status != "done" for why in outdated.values() for source in why.anew),
    )


def _place(files: StageFiles) -> Place:
    return Place(files.status.stage, files.status.variant, files.status.layers)


def _in_question(run: RunFiles) -> Iterator[StageFiles]:
    """Not what the config does not have."""
    known: Sequence[str] = list(run.labels) if run.config is None else [MAIN, *run.config.variants]
    for stage in STAGES:  # `begun` has a variant's finetune before the next variant's distill
        for files in run.of_stage(stage):
            if files.status.shard is None and files.variant in known:
                yield files
