"""Hidden states on disk: what was written is read, by anyone; what is torn, damaged or foreign is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hedgehog.pipeline.hidden_state_files import HiddenStateFiles

HIDDEN_SIZE = 5
LENGTHS = (3, 1, 7)


@pytest.fixture
def damages() -> list[str]:
    return []


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def new_files(tmp_path: Path, damages: list[str], request: pytest.FixtureRequest) -> Callable[..., HiddenStateFiles]:
    def make(fingerprint: str = "this config") -> HiddenStateFiles:
        files = HiddenStateFiles(tmp_path / "cache", fingerprint, HIDDEN_SIZE, request.param, damages.append)
        files.refresh()
        return files

    return make


def states_of(row: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(LENGTHS[row], HIDDEN_SIZE, generator=torch.Generator().manual_seed(row)).to(dtype)


def dtype_of(files: HiddenStateFiles) -> torch.dtype:
    return torch.float32 if files._token_bytes == 4 * HIDDEN_SIZE else torch.bfloat16


def fill(files: HiddenStateFiles, rows: tuple[int, ...] = (0, 1, 2)) -> None:
    for row in rows:
        files.append(row, states_of(row, dtype_of(files)))


def assert_has(files: HiddenStateFiles, *rows: int) -> None:
    """These rows, bit for bit, and no others."""
    assert [row for row in range(len(LENGTHS)) if row in files] == list(rows)
    assert files.num_bytes == sum(LENGTHS[row] for row in rows) * files._token_bytes
    for row in rows:
        expected = states_of(row, dtype_of(files))
        batch_BLE = torch.full((2, 9, HIDDEN_SIZE), torch.nan, dtype=expected.dtype)
        assert files.read(row, batch_BLE[1, 1 : 1 + len(expected)])
        assert torch.equal(batch_BLE[1, 1 : 1 + len(expected)], expected)
        assert batch_BLE[0].isnan().all() and batch_BLE[1, 0].isnan().all()


def only(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


def test_rows_are_read_by_who_wrote_them_and_by_others_once_they_look(
    new_files: Callable[..., HiddenStateFiles],
) -> None:
    first, second = new_files(), new_files()
    fill(first, (0, 2))
    fill(second, (1,))
    assert_has(first, 0, 2)
    assert_has(second, 1)
    first.refresh()
    assert_has(first, 0, 1, 2)
    second.refresh()
    second.refresh()
    assert_has(second, 0, 1, 2)
    assert_has(new_files(), 0, 1, 2)


def test_a_map_follows_a_file_that_grows(new_files: Callable[..., HiddenStateFiles]) -> None:
    writer, reader = new_files(), new_files()
    for row in range(3):
        fill(writer, (row,))
        reader.refresh()
        assert_has(reader, *range(row + 1))


@pytest.mark.parametrize("lost_bytes", [1, 27, 28, 29])
def test_a_torn_index_ends_where_it_is_whole(
    lost_bytes: int, new_files: Callable[..., HiddenStateFiles], tmp_path: Path, damages: list[str]
) -> None:
    fill(new_files())
    index = only(tmp_path / "cache", "*.index")
    index.write_bytes(index.read_bytes()[:-lost_bytes])
    resumed = new_files()
    assert_has(resumed, *(0, 1) if lost_bytes <= 28 else (0,))
    fill(resumed, tuple(row for row in range(3) if row not in resumed))
    assert_has(resumed, 0, 1, 2)
    assert_has(new_files(), 0, 1, 2)
    assert damages == []


def test_a_record_that_was_half_on_its_way_is_read_later(
    new_files: Callable[..., HiddenStateFiles], tmp_path: Path
) -> None:
    """A shared file system may show a file's beginning before its end."""
    fill(new_files())
    index, states = only(tmp_path / "cache", "*.index"), only(tmp_path / "cache", "*.states")
    records, content = index.read_bytes(), states.read_bytes()
    index.write_bytes(records[:-5])
    states.write_bytes(content[:-40])
    reader = new_files()
    assert_has(reader, 0, 1)
    index.write_bytes(records)
    reader.refresh()
    assert_has(reader, 0, 1)  # its states are not there
    states.write_bytes(content)
    reader.refresh()
    assert_has(reader, 0, 1, 2)


def test_a_damaged_record_ends_its_file(new_files: Callable[..., HiddenStateFiles], tmp_path: Path) -> None:
    fill(new_files())
    index = only(tmp_path / "cache", "*.index")
    content = bytearray(index.read_bytes())
    content[-28 - 20] ^= 1  # in the second of three
    index.write_bytes(content)
    assert_has(new_files(), 0)


def test_a_flipped_bit_is_found_and_the_row_written_again(
    new_files: Callable[..., HiddenStateFiles], tmp_path: Path, damages: list[str]
) -> None:
    fill(new_files())
    states = only(tmp_path / "cache", "*.states")
    content = bytearray(states.read_bytes())
    content[0] ^= 16
    states.write_bytes(content)
    files = new_files()
    out_LE = torch.empty(LENGTHS[0], HIDDEN_SIZE, dtype=dtype_of(files))
    assert not files.read(0, out_LE)
    assert len(damages) == 1 and "row 0" in damages[0]
    assert_has(files, 1, 2)
    fill(files, (0,))
    assert_has(files, 0, 1, 2)
    again = new_files()
    assert again.read(0, out_LE)  # the good copy, whichever file is listed first
    assert torch.equal(out_LE, states_of(0, out_LE.dtype))


def test_another_configs_files_are_not_read_but_removed(
    new_files: Callable[..., HiddenStateFiles], tmp_path: Path
) -> None:
    fill(new_files("another config"))
    files = new_files()
    assert_has(files)
    fill(files, (0,))
    (tmp_path / "cache" / "killed-at-once.index").write_bytes(b"")
    (tmp_path / "cache" / "orphan.states").write_bytes(b"xyz")
    assert files.remove_foreign() == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert_has(new_files(), 0)
    assert_has(new_files("another config"))
