"""Which rows a step sees, and the tensors made of them.

    rows ──pack?──▶ sequences ──shuffle, bucket──▶ global batches ──cut──▶ micro-batches ──deal──▶ ranks

Everything follows from (seed, position in the stream): step s is built directly, without replaying the steps
before it, and a global batch holds the same sequences whatever the number of processes or the size of a
micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from ..errors import ConfigError, DataError
from .packing import best_fit
from .tokens import TokenizedSplit

if TYPE_CHECKING:
    from ..config import ScheduleConfig

NO_LOSS = -100
"""Label of a position without loss (torch's ignore_index)."""

GLOBAL_BATCHES_PER_WINDOW = 8
"""Sequences are sorted by length inside windows of this many global batches. More saves padding and makes the
batches of a window less alike; 8 leaves each batch an eighth of the range of lengths."""

LossOn = Literal["all", "summary", "row"]
"""Positions that the loss is a mean over: all, or the summary's; or none, where it is a mean over rows, by class."""


class WorldShape(Protocol):
    """What a batch plan asks of the process group."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...


def _generator(*key: object) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def pack_rows(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Row numbers joined into sequences of at most `capacity` tokens: best fit, longest rows first.

    Rows of equal length are taken in seeded order. No row may be longer than `capacity`.
    """
    assert max(lengths, default=0) <= capacity
    order = torch.randperm(len(lengths), generator=_generator(seed, "packing")).tolist()
    order.sort(key=lambda row: -lengths[row])
    return best_fit(lengths, order, capacity)


def collate(
    split: TokenizedSplit, sequences: Sequence[Sequence[int]], pad_id: int, loss_on: LossOn
) -> dict[str, torch.Tensor]:
    """One micro-batch from sequences of rows, padded on the right to the longest. All int64 (B, L) but the
    mask.

    - `input_ids`: tokens; `pad_id` where `mask` is False. `mask`: bool, True at real tokens.
    - `position_ids`, `segment_ids`: count rows of a sequence as 0, 1, …, positions restart at 0 in each. The
      padding is one further segment.
    - `labels`: aligned with `input_ids` (the loss shifts them). NO_LOSS at padding, at the first token of
      every row (nothing of that row precedes it) and, for loss_on="summary", at the prompt. The row's EOS is
      always a label, whatever `pad_id` is. For loss_on="row" there are none.

    Of labelled rows, each a sequence by itself, there are two more:
    - `token_type_ids`: 0 in the first text and in padding, 1 in the second. `row_labels` (B,): the row's class, or,
      float32, its score.
    """
    assert loss_on != "row" or split.labels is not None
    length = max(sum(int(split.lengths[row]) for row in rows) for rows in sequences)
    shape = (len(sequences), length)
    input_ids_BL = torch.full(shape, pad_id, dtype=torch.int64)
    labels_BL = torch.full(shape, NO_LOSS, dtype=torch.int64)
    mask_BL = torch.zeros(shape, dtype=torch.bool)
    position_ids_BL = torch.zeros(shape, dtype=torch.int64)
    segment_ids_BL = torch.zeros(shape, dtype=torch.int64)
    for i, rows in enumerate(sequences):
        start = 0
        for segment, row in enumerate(rows):
            tokens, prompt_length = split[row]
            end = start + len(tokens)
            input_ids_BL[i, start:end] = tokens
            if loss_on != "row":
                first_label = max(1, prompt_length if loss_on == "summary" else 1)
                labels_BL[i, start + first_label : end] = tokens[first_label:]
            mask_BL[i, start:end] = True
            position_ids_BL[i, start:end] = torch.arange(len(tokens))
            segment_ids_BL[i, start:end] = segment
            start = end
        position_ids_BL[i, start:] = torch.arange(length - start)
        segment_ids_BL[i, start:] = len(rows)
    batch = {
        "input_ids": input_ids_BL,
        "mask": mask_BL,
        "position_ids": position_ids_BL,
        "segment_ids": segment_ids_BL,
        "labels": labels_BL,
    }
    if split.labels is not None:
        rows_B = torch.tensor([row for (row,) in sequences], dtype=torch.int64)
        first_B1 = split.prompt_lengths[rows_B].unsqueeze(1)
        batch["token_type_ids"] = ((torch.arange(length) >= first_B1) & mask_BL).to(torch.int64)
        labels_B = split.labels[rows_B]
        batch["row_labels"] = labels_B if labels_B.is_floating_point() else labels_B.to(torch.int64)
    return batch


def _num_labels(split: TokenizedSplit, sequences: Sequence[Sequence[int]], loss_on: LossOn) -> int:
    rows = torch.tensor([row for sequence in sequences for row in sequence], dtype=torch.int64)
    if loss_on == "row":
        return len(rows)
    without = split.prompt_lengths[rows].clamp(min=1) if loss_on == "summary" else torch.ones_like(rows)
    return int((split.lengths[rows] - without).sum())


def _num_tokens(split: TokenizedSplit, sequences: Sequence[Sequence[int]]) -> int:
    return sum(int(split.lengths[row]) for sequence in sequences for row in sequence)


class BatchPlan:
    """The training batches of one stage, for one rank.

    A stream of sequences (one shuffled epoch after the other) is cut into windows of
    GLOBAL_BATCHES_PER_WINDOW global batches; a window's sequences are sorted by length, cut into global
    batches, and those are shuffled. `epochs` may be a fraction; a last batch is filled from the next epoch,
    so that every batch has `global_batch_size` sequences.

    Raises ConfigError where global_batch_size is not a multiple of micro_batch_size x world size, DataError
    without rows or with a row longer than `max_length`.
    """

    def __init__(
        self,
        split: TokenizedSplit,
        schedule: ScheduleConfig,
        max_length: int,
        pad_id: int,
        seed: int,
        world: WorldShape,
        loss_on: LossOn = "summary",
    ):
        if len(split) == 0:
            raise DataError("no training rows are left; see prepare's table for what was dropped and why")
        if (longest := int(split.lengths.max())) > max_length:
            raise DataError(
                f"a training row has {longest} tokens, more than data.max_length_tokens = {max_length}; "
                "run prepare again"
            )
        per_pass = schedule.micro_batch_size * world.world_size
        if schedule.global_batch_size % per_pass:
            raise ConfigError(
                f"global_batch_size {schedule.global_batch_size} is not a multiple of micro_batch_size "
                f"{schedule.micro_batch_size} x {world.world_size} processes; the next multiple is "
                f"{math.ceil(schedule.global_batch_size / per_pass) * per_pass}"
            )
        self.split = split
        self.pad_id = pad_id
        self.seed = seed
        self.world = world
        self.loss_on: LossOn = loss_on
        self.global_batch_size = schedule.global_batch_size
        self.micro_batch_size = schedule.micro_batch_size
        lengths = split.lengths.tolist()
        self.sequences = (
            pack_rows(lengths, max_length, seed) if schedule.packing else [[row] for row in range(len(split))]
        )
        self._sequence_lengths = [sum(lengths[row] for row in rows) for rows in self.sequences]
        self.num_accumulation = schedule.global_batch_size // per_pass
        """Micro-batches a rank runs before an optimizer step."""
        self.num_steps = schedule.max_steps or max(
            1, math.ceil(schedule.epochs * len(self.sequences) / schedule.global_batch_size - 1e-9)
        )
        """Optimizer steps of the whole training."""
        self.num_passes = self.num_steps * schedule.global_batch_size / len(self.sequences)
        """Epochs of the whole training, also where `max_steps` decides."""
        # Cached per plan, not on the function: the cache must die with the plan and its tokens.
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)
        self._window = lru_cache(maxsize=1)(self._arrange_window)

    def _shuffle_epoch(self, epoch: int) -> list[int]:
        return torch.randperm(len(self.sequences), generator=_generator(self.seed, "epoch", epoch)).tolist()

    def _arrange_window(self, window: int) -> list[list[int]]:
        per_window = GLOBAL_BATCHES_PER_WINDOW * self.global_batch_size
        start = window * per_window
        end = min(start + per_window, self.num_steps * self.global_batch_size)
        members = []
        for position in range(start, end):
            epoch, index = divmod(position, len(self.sequences))
            members.append(self._epoch_order(epoch)[index])
        members.sort(key=lambda sequence: self._sequence_lengths[sequence])
        batches = [members[i : i + self.global_batch_size] for i in range(0, len(members), self.global_batch_size)]
        order = torch.randperm(len(batches), generator=_generator(self.seed, "window", window)).tolist()
        return [batches[i] for i in order]

    def global_batch(self, step: int) -> list[list[int]]:
        """The sequences of step `step` (from 0), each a list of row numbers, shortest first. The same on
        every rank."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan with {self.num_steps} steps")
        window, index = divmod(step, GLOBAL_BATCHES_PER_WINDOW)
        return [self.sequences[sequence] for sequence in self._window(window)[index]]

    def step(self, step: int) -> list[dict[str, Any]]:
        """This rank's micro-batches of step `step`: what `collate` gives, and two counts over the whole
        global batch; each sequence's `rows` and their `row_tokens`; the `epoch` (from 0) in which the step's
        window begins: by then every row was seen in the epochs before.

        `tokens_in_global_batch`: positions with a label, the normaliser of the loss, or for loss_on="row" rows;
        `real_tokens_in_global_batch`: positions with mask True. Dividing by them makes the step's gradient
        the same for every world size and micro-batch size.
        """
        sequences = self.global_batch(step)
        window_start = step // GLOBAL_BATCHES_PER_WINDOW * GLOBAL_BATCHES_PER_WINDOW
        epoch = window_start * self.global_batch_size // len(self.sequences)
        counts = {
            "tokens_in_global_batch": _num_labels(self.split, sequences, self.loss_on),
            "real_tokens_in_global_batch": _num_tokens(self.split, sequences),
        }
        # Neighbours in length go to different ranks, so that no rank waits long for another.
        starts = range(
            self.world.rank * self.micro_batch_size,
            self.global_batch_size,
            self.world.world_size * self.micro_batch_size,
        )
        return [
            {
                **collate(self.split, sequences[i : i + self.micro_batch_size], self.pad_id, self.loss_on),
                **counts,
                "rows": sequences[i : i + self.micro_batch_size],
                "row_tokens": [
                    [int(self.split.lengths[row]) for row in rows] for rows in sequences[i : i + self.micro_batch_size]
                ],
                "epoch": epoch,
            }
            for i in starts
        ]


def validation_batches(
    split: TokenizedSplit, batch_size: int, pad_id: int, world: WorldShape, loss_on: LossOn = "summary"
) -> list[dict[str, Any]]:
    """Every row once, in order, without packing: this rank's batches, as many on every rank.

    Where the batches do not divide among the ranks, some ranks get a repeated batch with `counted` False: it
    must be run (sharded weights need all ranks in every forward pass) and left out of the mean.
    """
    if len(split) == 0:
        raise DataError("no validation rows are left; see prepare's table for what was dropped and why")
    chunks = [[[row] for row in range(i, min(i + batch_size, len(split)))] for i in range(0, len(split), batch_size)]
    batches = []
    for turn in range(math.ceil(len(chunks) / world.world_size)):
        number = turn * world.world_size + world.rank
        counted = number < len(chunks)
        chunk = chunks[number if counted else 0]
        batches.append({**collate(split, chunk, pad_id, loss_on), "counted": counted})
    return batches
