"""Which dialogues are shown does not depend on what came out."""

from __future__ import annotations

from hedgehog.pipeline.report.samples import choose


def rows(seen: str) -> list[dict]:
    return [{"index": index, "seen_in_train": mark == "x"} for index, mark in enumerate(seen)]


def chosen(seen: str, most: int = 3) -> list[int]:
    return [row["index"] for row in choose(rows(seen), most)]


def test_evenly_spaced_among_those_not_in_train():
    assert chosen("." * 9) == [1, 4, 7]
    assert chosen("xxx" + "." * 9) == [4, 7, 10]
    assert chosen("." * 819, 5) == [81, 245, 409, 573, 737]


def test_all_of_them_then_those_in_train_where_there_are_few():
    assert chosen("x.xx.") == [1, 4, 0]
    assert chosen("xxxx") == [0, 1, 2]
    assert chosen("...") == [0, 1, 2] and chosen("") == []
