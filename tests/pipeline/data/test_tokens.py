from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
