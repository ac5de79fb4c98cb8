"""`distill.cache_hidden_states`: the teacher's layers below the first trained one run once per row, not in every epoch.

    lookup(batch) ──all rows there?──▶ states entering layer `first` ──▶ layers first … last
          └──no──▶ embedding, layers 0 … first - 1 ──store(batch)──▶ layers first … last

Segments of a packed sequence attend only to themselves, with positions of their own, so a row's states are the same
wherever it stands, up to rounding: a matrix product's last bits may depend on the shape of the batch. States are
those of real tokens; what stands at padding is never looked at, and comes back as zeros.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoints import KEPT
from .errors import ResourceError
from .formatting import format_bytes
from .hidden_state_files import HiddenStateFiles
from .hidden_state_size import KEY, cache_size, without_use
from .manifest import StageInput, fingerprint
from .run_folder import HIDDEN_STATES, write_fault
from .training import sum_over_ranks

if TYPE_CHECKING:
    from .config import RunConfig
    from .data.batches import BatchPlan
    from .distributed import World
    from .metrics import Reporter


MOST_CHECKPOINTS = KEPT + 2
"""The best one and the one that is being written besides."""


class HiddenStateCache:
    """Hidden states of training rows on disk, shared by all processes and all attempts of a stage.

    Args:
        files: where they lie.
        num_passes: epochs of the whole training. What is computed in the last one is not kept.
        lockstep: whether all ranks must run the same layers in every pass (ZeRO-3 gathers weights together).
        reserve_bytes: free space that is left to the stage's checkpoints.
    """

    def __init__(
        self,
        files: HiddenStateFiles,
        hidden_size: int,
        dtype: torch.dtype,
        world: World,
        *,
        num_passes: float,
        lockstep: bool,
        reserve_bytes: int,
        warn: Callable[[str], None],
    ) -> None:
        self._files = files
        self._reserve_bytes = reserve_bytes
        self._hidden_size, self._dtype = hidden_size, dtype
        self._world = world
        self._num_passes = num_passes
        self._lockstep = lockstep and world.world_size > 1
        self._warn = warn
        self._untold: list[str] = []
        self._epoch: int | None = None
        self._writes = True
        self._damage_seen = False

    def lookup(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """The states that enter the first trained layer, (B, L, hidden size) on this rank's device; None where they
        are to be computed. Collective at the first batch of an epoch, and under ZeRO-3."""
        if batch["epoch"] != self._epoch:
            self._begin_epoch(batch["epoch"])
        states_BLE = self._read(batch)
        missing = states_BLE is None
        if self._lockstep:
            vote = {"missing": torch.tensor([float(missing)], device=self._world.device)}
            missing = bool(sum_over_ranks(vote, self._world)["missing"])
        return None if missing or states_BLE is None else states_BLE.to(self._world.device)

    def store(self, batch: Mapping[str, Any], states_BLE: torch.Tensor) -> torch.Tensor:
        """Keep the states of the batch's rows that are not kept yet; those of the others are replaced by what is kept.

        So a row has the bits of its first time in all epochs, also after a resume, whatever rows it comes with. A disk
        that fills up ends the writing, not the run.
        """
        assert states_BLE.dtype == self._dtype, f"the teacher computes in {states_BLE.dtype}"
        for row, i, here in _spans(batch):
            states_LE = states_BLE[i, here].contiguous().cpu()
            if row in self._files and self._files.read(row, kept_LE := torch.empty_like(states_LE)):
                states_BLE[i, here] = kept_LE.to(states_BLE.device)
            elif self._writes and batch["epoch"] + 1 < self._num_passes:
                try:
                    self._leave_room(states_LE.nbytes)
                    self._files.append(row, states_LE)
                except OSError as error:
                    self._stop_writing(error)
        return states_BLE

    def close(self) -> None:
        """Tell what no rank has told yet, and close the files. Collective."""
        self._tell()
        self._files.close()

    def _leave_room(self, num_bytes: int) -> None:
        """Raise OSError where so many bytes more would leave the checkpoints too little."""
        free = shutil.disk_usage(self._files.folder).free
        if free - num_bytes < self._reserve_bytes:
            raise OSError(
                f"{format_bytes(free)} are free, and checkpoints may need {format_bytes(self._reserve_bytes)} of them"
            )

    def _read(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        if not all(row in self._files for row, _, _ in _spans(batch)):
            return None
        states_BLE = torch.zeros((*batch["input_ids"].shape, self._hidden_size), dtype=self._dtype)
        for row, i, here in _spans(batch):
            if not self._files.read(row, states_BLE[i, here]):
                return None
        return states_BLE

    def _begin_epoch(self, epoch: int) -> None:
        """Show this rank's rows to the others, and take up theirs."""
        begun, self._epoch = self._epoch, epoch
        if begun is None:
            return  # opened just now
        try:
            self._files.sync()
        except OSError as error:
            self._stop_writing(error)
        self._tell()
        self._files.refresh()

    def _tell(self) -> None:
        """Rank 0 prints what happened on the others. Collective, so that every rank's files are written after it."""
        untold, self._untold = self._untold, []
        for rank, messages in enumerate(self._world.gather(untold)):
            for message in messages:
                self._warn(f"process {rank}: {message}")

    def _say(self, message: str) -> None:
        if self._world.is_main:
            self._warn(message)
        else:
            self._untold.append(message)

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        self._files.stop_writing()
        self._say(
            f"{KEY}: writing stopped ({error.strerror or error}). The run goes on; rows that are not kept yet are "
            "computed in every epoch."
        )

    def damaged(self, what: str) -> None:
        """Warn of the first damaged row; it and any other are computed anew."""
        if not self._damage_seen:
            self._say(f"{what}; it is computed again, as is any other such row. Look after the disk.")
        self._damage_seen = True


def _spans(batch: Mapping[str, Any]) -> Iterator[tuple[int, int, slice]]:
    """(row number, place in the batch, positions) of every row of a batch whose sequences are padded on the right."""
    for i, rows in enumerate(batch["rows"]):
        start = 0
        for row, tokens in zip(rows, batch["row_tokens"][i], strict=True):
            yield row, i, slice(start, start + tokens)
            start += tokens


def open_cache(
    config: RunConfig,
    folder: Path,
    prepare: StageInput,
    plan: BatchPlan,
    layers: Sequence[int],
    hidden_size: int,
    checkpoint_bytes: int,
    world: World,
    reporter: Reporter,
) -> HiddenStateCache | None:
    """The stage's cache with what earlier attempts left in it, or None where it is off or of no use. Collective.

    Args:
        folder: the stage's own.
        layers: those that are trained.
        checkpoint_bytes: size of one of the stage's checkpoints. Room for as many as there may be is left free.

    Raises:
        ResourceError: the disk has too little space for what is still to be written.
    """
    if not config.distill.cache_hidden_states:
        return None
    useless = without_use(min(layers), plan.num_passes)
    if useless is not None:
        reporter.info(f"{KEY} has no effect: {useless}")
        return None
    dtype = getattr(torch, config.engine.precision)
    cache: HiddenStateCache | None = None

    def damaged(what: str) -> None:
        assert cache is not None, "rows are read through the cache"
        cache.damaged(what)

    identity = _identity(config, prepare, min(layers), hidden_size)
    files = HiddenStateFiles(folder / HIDDEN_STATES, identity, hidden_size, dtype, damaged)
    if world.is_main and (removed := files.remove_foreign()):
        reporter.info(
            f"{KEY}: removed {removed} {'file' if removed == 1 else 'files'} of hidden states that belong to another "
            "config or input, or were never begun"
        )
    world.barrier()
    files.refresh()
    lengths = plan.split.lengths
    size = cache_size(config, len(lengths), int(lengths.sum()), hidden_size)
    kept, free = world.broadcast((files.num_bytes, shutil.disk_usage(folder).free))
    there = f"; {format_bytes(kept)} are there already" if kept else ""
    reporter.info(f"{KEY}: hidden states that enter layer {min(layers)} take {size}{there}")
    reserve = MOST_CHECKPOINTS * checkpoint_bytes
    needed = size.num_bytes - kept + reserve
    if needed > free:
        files.close()
        raise ResourceError(
            f"{KEY}: needs {format_bytes(needed)} in {folder} ({format_bytes(reserve)} of them for checkpoints), "
            f"where {format_bytes(free)} are free. Free some space, choose another output_dir, or set {KEY}=false."
        )
    cache = HiddenStateCache(
        files,
        hidden_size,
        dtype,
        world,
        num_passes=plan.num_passes,
        lockstep=config.engine.zero_stage == 3,
        reserve_bytes=reserve,
        warn=reporter.warning,
    )
    return cache


def remove_cache(folder: Path) -> None:
    """Remove what the cache of a finished stage holds."""
    if write_fault() is None:
        shutil.rmtree(folder / HIDDEN_STATES, ignore_errors=True)


def _identity(config: RunConfig, prepare: StageInput, first_layer: int, hidden_size: int) -> str:
    """SHA-256 of everything that the states depend on: tokens, base model, its type, the layer they enter."""
    base = str(prepare.summary["base_model"])
    return fingerprint(
        {
            "prepare": prepare.manifest.output_fingerprint,
            "base": os.path.abspath(base) if os.path.isdir(base) else base,
            "base_fingerprint": prepare.summary.get("base_fingerprint"),
            "revision": config.model.revision,
            "quantization": config.model.quantization,
            "max_length_tokens": config.data.max_length_tokens,
            "dtype": config.engine.precision,
            "hidden_size": hidden_size,
            "first_layer": first_layer,
        }
    )
