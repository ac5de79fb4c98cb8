"""A tokenized split: all rows end to end in one memory-mapped safetensors file.

input_ids       int32 (T,)      prompt, summary and EOS of row 0, then of row 1, …
offsets         int64 (N + 1,)  row i is input_ids[offsets[i] : offsets[i + 1]]
prompt_lengths  int32 (N,)      tokens of row i that belong to the prompt
labels          (N,)            of labelled rows only, whose prompt is the first text: int32, the class of row i, or
                                float32, its score
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import CheckpointError
from ..run_folder import atomic_write


class TokenizedSplit:
    """Read-only rows of tokens. Opening reads the header only; a row's tokens are read when asked for."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        offsets: torch.Tensor,
        prompt_lengths: torch.Tensor,
        labels: torch.Tensor | None = None,
    ):
        self.input_ids = input_ids
        self.offsets = offsets
        self.prompt_lengths = prompt_lengths
        self.labels = labels
        """(N,): int32, the class of each row; or float32, its score; or None."""
        self.lengths = offsets[1:] - offsets[:-1]
        """int64 (N,): tokens of each row."""

    @classmethod
    def from_rows(
        cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]], labels: Sequence[int | float] | None = None
    ) -> TokenizedSplit:
        """Rows in memory, from pairs (prompt tokens, summary tokens with EOS), or, where they have labels, pairs
        (tokens of the first text, of the second), each with its special tokens.

        `labels` may grow with `rows`: it is looked at last. One float among them makes all of them scores.
        """
        flat: list[int] = []
        offsets, prompt_lengths = [0], []
        for prompt_ids, summary_ids in rows:
            flat.extend(prompt_ids)
            flat.extend(summary_ids)
            offsets.append(len(flat))
            prompt_lengths.append(len(prompt_ids))
        label_type = torch.float32 if any(isinstance(label, float) for label in labels or ()) else torch.int32
        return cls(
            torch.tensor(flat, dtype=torch.int32),
            torch.tensor(offsets, dtype=torch.int64),
            torch.tensor(prompt_lengths, dtype=torch.int32),
            None if labels is None else torch.tensor(labels, dtype=label_type),
        )

    @classmethod
    def open(cls, path: str | Path) -> TokenizedSplit:
        """Memory-map a file that `write` made. Raises CheckpointError where there is no such file, or half of one."""
        try:
            with safe_open(str(path), framework="pt") as file:
                labels = ("labels",) if "labels" in file.keys() else ()  # noqa: SIM118
                names = ("input_ids", "offsets", "prompt_lengths", *labels)
                tensors = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: not a readable token file ({error}); run prepare again with --force"
            ) from None
        split = cls(**tensors)
        lengths = split.lengths
        whole = (
            len(split.offsets) == len(split.prompt_lengths) + 1
            and int(split.offsets[0]) == 0
            and int(split.offsets[-1]) == len(split.input_ids)
            and bool((lengths >= split.prompt_lengths + int(split.labels is None)).all())
            and (split.labels is None or split.labels.shape == split.prompt_lengths.shape)
        )
        if not whole:
            raise CheckpointError(f"{path}: offsets and tokens disagree; run prepare again with --force")
        return split

    def write(self, path: str | Path) -> None:
        """Write the file atomically."""
        tensors = {"input_ids": self.input_ids, "offsets": self.offsets, "prompt_lengths": self.prompt_lengths}
        if self.labels is not None:
            tensors["labels"] = self.labels
        # Serialized here and written by us: safetensors reports a full disk as an error of its own, without errno.
        atomic_write(Path(path), save(tensors))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Row `index`: (input_ids int64 (L,), number of prompt tokens)."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a split with {len(self)} rows")
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.input_ids[start:end].to(torch.int64), int(self.prompt_lengths[index])
