"""Rows survive kills, torn lines and another number of processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.row_log import RowLog, read_complete_rows

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def line(index: int, text: str = "x") -> str:
    return json.dumps({"index": index, "text": text}) + "\n"


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path: Path):
    with RowLog(tmp_path / "p" / "a.jsonl", ALONE) as log:
        log.append([{"index": 2}, {"index": 0}])
        assert (tmp_path / "p" / "a.jsonl").read_text() == '{"index": 2}\n{"index": 0}\n'
    assert [row["index"] for row in read_complete_rows(tmp_path / "p" / "a.jsonl")] == [0, 2]


@pytest.mark.parametrize(
    "torn",
    ['{"index": 7, "te', '{"index": 7}', "\x00\x00\x00", "[7]\n", "{}\n", '{"index": 7,}\n{"index": 8}\n'],
)
def test_everything_from_a_torn_line_on_is_made_again(tmp_path: Path, torn: str):
    file = tmp_path / "a.jsonl"
    file.write_text(line(3) + line(1) + torn)
    with RowLog(file, ALONE) as log:
        assert log.done == {1, 3}
        log.append([{"index": 7, "text": "whole"}])
    assert file.read_text() == line(1) + line(3) + line(7, "whole")


def test_a_line_separator_inside_text_does_not_tear_a_line(tmp_path: Path):
    with RowLog(tmp_path / "a.jsonl", ALONE) as log:
        log.append([{"index": 0, "text": "a\u2028b\r\nc"}])
    assert read_complete_rows(tmp_path / "a.jsonl") == [{"index": 0, "text": "a\u2028b\r\nc"}]


def test_one_process_goes_on_with_what_three_left(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_text(line(0))
    (tmp_path / "a.rank1.jsonl").write_text(line(4) + '{"ind')
    (tmp_path / "a.rank2.jsonl").write_text(line(2))
    (tmp_path / "a.rankings.jsonl").write_text(line(9))  # another variant's file
    with RowLog(file, ALONE) as log:
        assert log.done == {0, 2, 4}
    assert file.read_text() == line(0) + line(2) + line(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.rankings.jsonl"]


def test_an_error_leaves_the_rows_for_the_next_attempt(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    with pytest.raises(KeyboardInterrupt), RowLog(file, ALONE) as log:
        log.append([{"index": 5}])
        raise KeyboardInterrupt
    with RowLog(file, ALONE) as log:
        assert log.done == {5}


def test_no_file_has_no_rows(tmp_path: Path):
    assert read_complete_rows(tmp_path / "none.jsonl") == []
