from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError

IDS = st.lists(st.integers(0, 40000), min_size=1, max_size=6)
ROWS = st.lists(st.tuples(IDS, IDS), max_size=6)


@settings(deadline=None, max_examples=50)
@given(ROWS)
def test_rows_come_back_as_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("split") / "tokens.safetensors"
    TokenizedSplit.from_rows(rows).write(path)
    split = TokenizedSplit.open(path)
    assert len(split) == len(rows)
    for i, (prompt, summary) in enumerate(rows):
        tokens, prompt_length = split[i]
        assert tokens.tolist() == prompt + summary
        assert tokens.dtype == torch.int64
        assert prompt_length == len(prompt)
    assert [p.name for p in path.parent.iterdir()] == ["tokens.safetensors"]
    with pytest.raises(IndexError):
        split[len(rows)]


def test_missing_torn_and_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "tokens.safetensors"
    with pytest.raises(CheckpointError, match="not a readable token file"):
        TokenizedSplit.open(path)
    TokenizedSplit.from_rows([([1, 2, 3], [4, 2])] * 9).write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="run prepare again"):
        TokenizedSplit.open(path)
    save_file(
        {
            "input_ids": torch.arange(5, dtype=torch.int32),
            "offsets": torch.tensor([0, 9]),
            "prompt_lengths": torch.tensor([1], dtype=torch.int32),
        },
        str(path),
    )
    with pytest.raises(CheckpointError, match="disagree"):
        TokenizedSplit.open(path)


def test_rows_with_classes_come_back_as_written(tmp_path):
    path = tmp_path / "tokens.safetensors"
    TokenizedSplit.from_rows([([1, 2], []), ([3], [4, 5])], [7, 0]).write(path)
    split = TokenizedSplit.open(path)
    assert split.labels is not None and split.labels.dtype == torch.int32 and split.labels.tolist() == [7, 0]
    assert split.prompt_lengths.tolist() == [2, 1] and split.lengths.tolist() == [2, 3]
    TokenizedSplit.from_rows([([1, 2], [3])]).write(path)
    assert TokenizedSplit.open(path).labels is None
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"input_ids", "offsets", "prompt_lengths"}


@pytest.mark.parametrize("labels", [None, [1], [1, 0, 1]])
def test_classes_that_do_not_belong_to_the_rows_are_refused(tmp_path, labels):
    """Without classes a row without a summary is no row."""
    path = tmp_path / "tokens.safetensors"
    TokenizedSplit.from_rows([([1, 2], []), ([3], [4, 5])], labels).write(path)
    with pytest.raises(CheckpointError, match="disagree"):
        TokenizedSplit.open(path)
