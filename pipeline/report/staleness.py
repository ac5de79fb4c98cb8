"""Which stages were made from what is not there any more: an input ran anew since, or is out of date itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..go_on import commands_to_renew, shown
from ..run_folder import MAIN, SHARED_STAGES, STAGES
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
    first: dict[str, tuple[str, ...]] = {}
    titles: list[str] = []
    found: list[StageFiles] = []
    input_unfinished = False
    for files in _in_question(run):
        anew, stale = [], False
        for source, digest in files.manifest.consumed.items():
            given = _input(run, files, source)
            if given is None:
                continue
            unfinished = given.status.state == "unfinished"
            if given.status.title in titles:
                stale = True
            elif unfinished or given.manifest.output_fingerprint != digest:
                anew.append(given.status.title)
                input_unfinished |= unfinished
        if anew and not stale:
            first[files.status.title] = tuple(dict.fromkeys(anew))
        if anew or stale:
            found.append(files)
            titles.append(files.status.title)
    commands = commands_to_renew(run.folder, run.config, [files.status for files in found])
    return Stale(first, tuple(titles), tuple(shown(command) for command in commands), input_unfinished)


def _in_question(run: RunFiles) -> Iterator[StageFiles]:
    """Not what had nothing to do, for it is the same whatever it would have consumed; nor what the config has not."""
    known: Sequence[str] = list(run.labels) if run.config is None else [MAIN, *run.config.variants]
    for stage in STAGES:  # `begun` has a variant's finetune before the next variant's distill
        for files in run.of_stage(stage):
            if files.status.state != "skipped" and files.status.shard is None and files.variant in known:
                yield files


def _input(run: RunFiles, files: StageFiles, source: str) -> StageFiles | None:
    """The stage that a key of `consumed` means: `distill` is that of the same conversion, `t2r/distill` a variant's."""
    name, _, stage = source.rpartition("/")
    if stage not in STAGES:
        return None  # a file from outside the run
    return run.whole(stage, MAIN if stage in SHARED_STAGES else name or files.variant)
