from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgehog.pipeline.config import ScheduleConfig
from hedgehog.pipeline.data.batches import NO_LOSS, BatchPlan, collate, pack_rows, validation_batches
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import ConfigError, DataError

PAD, EOS = 0, 2
MAX_LENGTH = 24


@dataclass
class World:
    rank: int = 0
    world_size: int = 1


def make_split(lengths: list[tuple[int, int]]) -> TokenizedSplit:
    """Row i has `prompt` tokens and `summary` tokens (all 10 + i) and an EOS, so that a token tells its
    row."""
    return TokenizedSplit.from_rows(
        ([10 + i] * prompt, [10 + i] * summary + [EOS]) for i, (prompt, summary) in enumerate(lengths)
    )


SPLITS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=30).map(make_split)
SCHEDULES = st.builds(
    lambda micro, ranks, accumulation, epochs, packing: (
        ScheduleConfig(
            micro_batch_size=micro,
            global_batch_size=micro * ranks * accumulation,
            epochs=epochs,
            packing=packing,
        ),
        ranks,
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.3, 1.0, 1.5, 3.0]),
    st.booleans(),
)


def make_plan(split, schedule, rank=0, ranks=1, seed=0, loss_on="summary") -> BatchPlan:
    return BatchPlan(split, schedule, MAX_LENGTH, PAD, seed, World(rank, ranks), loss_on)


def real_rows(micro_batches) -> list[tuple[int, ...]]:
    """The rows of micro-batches, each as its tuple of tokens, sorted."""
    rows = []
    for batch in micro_batches:
        for i in range(len(batch["input_ids"])):
            tokens = batch["input_ids"][i][batch["mask"][i]].tolist()
            while tokens:
                end = tokens.index(EOS) + 1
                rows.append(tuple(tokens[:end]))
                tokens = tokens[end:]
    return sorted(rows)


@settings(deadline=None, max_examples=60)
@given(SPLITS, SCHEDULES, st.integers(0, 3), st.sampled_from(["all", "summary"]))
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(split, schedule_and_ranks, seed, loss_on):
    schedule, ranks = schedule_and_ranks
    whole_schedule = schedule.model_copy(update={"micro_batch_size": schedule.global_batch_size})
    alone = make_plan(split, whole_schedule, seed=seed, loss_on=loss_on)
    plans = [make_plan(split, schedule, rank, ranks, seed, loss_on) for rank in range(ranks)]
    assert {plan.num_steps for plan in plans} == {alone.num_steps}
    for step in range(min(alone.num_steps, 12)):
        parts = [plan.step(step) for plan in plans]
        assert all(len(part) == plans[0].num_accumulation for part in parts)
        assert all(len(batch["input_ids"]) == schedule.micro_batch_size for part in parts for batch in part)
        dealt = [batch for part in parts for batch in part]
        (together,) = alone.step(step)
        assert real_rows(dealt) == real_rows([together])
        labels = sum(int((batch["labels"] != NO_LOSS).sum()) for batch in dealt)
        tokens = sum(int(batch["mask"].sum()) for batch in dealt)
        for batch in [*dealt, together]:
            assert batch["tokens_in_global_batch"] == labels
            assert batch["real_tokens_in_global_batch"] == tokens


@settings(deadline=None, max_examples=60)
@given(SPLITS, SCHEDULES, st.integers(0, 3), st.data())
def test_any_step_is_reached_directly(split, schedule_and_ranks, seed, data):
    schedule, ranks = schedule_and_ranks
    walked = make_plan(split, schedule, 0, ranks, seed)
    batches = [walked.step(step) for step in range(walked.num_steps)]
    step = data.draw(st.integers(0, walked.num_steps - 1))
    resumed = make_plan(split, schedule, 0, ranks, seed).step(step)
    for a, b in zip(batches[step], resumed, strict=True):
        assert a.keys() == b.keys()
        lists = ("rows", "row_tokens")
        assert all(a[key] == b[key] for key in lists)
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a.keys() - {*lists})


@settings(deadline=None, max_examples=60)
@given(SPLITS, SCHEDULES, st.integers(0, 3))
def test_every_row_is_seen_as_often_as_epochs_say(split, schedule_and_ranks, seed):
    schedule, ranks = schedule_and_ranks
    plan = make_plan(split, schedule, 0, ranks, seed)
    seen = Counter(row for step in range(plan.num_steps) for rows in plan.global_batch(step) for row in rows)
    positions = plan.num_steps * schedule.global_batch_size
    passes = positions / len(plan.sequences)
    assert all(int(passes) <= seen[row] <= int(passes) + 1 for row in range(len(split)))
    assert schedule.epochs <= passes < schedule.epochs + schedule.global_batch_size / len(plan.sequences) + 1e-6 or (
        plan.num_steps == 1
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_LENGTH), max_size=60), st.integers(0, 5))
def test_packing_places_every_row_once_and_fits(lengths, seed):
    sequences = pack_rows(lengths, MAX_LENGTH, seed)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in rows) for rows in sequences]
    assert all(fill <= MAX_LENGTH for fill in fills)
    # Best fit never leaves two sequences that would have fitted into one.
    assert len(fills) < 2 or sum(sorted(fills)[:2]) > MAX_LENGTH


def test_tensors_of_a_packed_batch():
    split = TokenizedSplit.from_rows([([1, 11], [12, EOS]), ([1], [13, EOS]), ([1, 14, 15, 16, 17, 18], [19, EOS])])
    batch = collate(split, [[0, 1], [2]], pad_id=EOS, loss_on="summary")
    assert batch["input_ids"].tolist() == [
        [1, 11, 12, EOS, 1, 13, EOS, EOS],
        [1, 14, 15, 16, 17, 18, 19, EOS],
    ]
    assert batch["mask"].tolist() == [[True] * 7 + [False], [True] * 8]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0] * 8]
    # Padding equals EOS here, and yet every real EOS is a label and the padding is none.
    n = NO_LOSS
    assert batch["labels"].tolist() == [[n, n, 12, EOS, n, 13, EOS, n], [n] * 6 + [19, EOS]]
    everything = collate(split, [[0, 1]], pad_id=EOS, loss_on="all")
    assert everything["labels"].tolist() == [[n, 11, 12, EOS, n, 13, EOS]]


def test_rows_of_a_batch_are_of_similar_length_and_still_shuffled():
    generator = torch.Generator().manual_seed(0)
    split = make_split([(int(n), 1) for n in torch.randint(1, 20, (256,), generator=generator)])
    schedule = ScheduleConfig(global_batch_size=8, micro_batch_size=8, epochs=2)
    plan = make_plan(split, schedule)
    batches = [plan.step(step)[0] for step in range(plan.num_steps)]
    padding = sum(int((~batch["mask"]).sum()) for batch in batches)
    assert padding < 0.12 * sum(batch["mask"].numel() for batch in batches)
    widths = [batch["mask"].shape[1] for batch in batches]
    assert widths != sorted(widths)
    half = plan.num_steps // 2
    first, second = ([plan.global_batch(step) for step in range(a, a + half)] for a in (0, half))
    assert first != second
    assert [make_plan(split, schedule, seed=1).global_batch(step) for step in range(half)] != first


def test_max_steps_overrides_epochs_and_may_pass_the_data_many_times():
    plan = make_plan(make_split([(2, 1)] * 3), ScheduleConfig(global_batch_size=4, max_steps=50))
    assert plan.num_steps == 50
    assert len(plan.step(49)) == 4
    with pytest.raises(IndexError):
        plan.step(50)


def test_impossible_plans_are_refused():
    split = make_split([(2, 1)])
    with pytest.raises(ConfigError, match=r"not a multiple of micro_batch_size 2 x 2 processes.*is 8"):
        make_plan(split, ScheduleConfig(global_batch_size=6, micro_batch_size=2), ranks=2)
    with pytest.raises(DataError, match="no training rows"):
        make_plan(make_split([]), ScheduleConfig())
    with pytest.raises(DataError, match="max_length_tokens"):
        make_plan(make_split([(30, 1)]), ScheduleConfig())


@given(SPLITS, st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_validation_counts_every_row_once_with_equal_turns(split, batch_size, ranks):
    per_rank = [validation_batches(split, batch_size, PAD, World(rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = [batch for batches in per_rank for batch in batches if batch["counted"]]
    assert real_rows(counted) == sorted(tuple(split[i][0].tolist()) for i in range(len(split)))


def test_validation_without_rows_is_refused():
    with pytest.raises(DataError, match="no validation rows"):
        validation_batches(make_split([]), 2, PAD, World())


CLASSES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(CLASSES, SCHEDULES, st.sampled_from(["all", "row"]))
def test_rows_to_classify_keep_their_class_and_their_border(rows, schedule_and_ranks, loss_on):
    """Token i of a row is 100 * row + 1 + i: a token tells where it belongs."""
    schedule, ranks = schedule_and_ranks
    schedule = schedule.model_copy(update={"packing": False})
    ids = [list(range(100 * i + 1, 100 * i + 1 + first + second)) for i, (first, second, _) in enumerate(rows)]
    split = TokenizedSplit.from_rows(
        ((row[:first], row[first:]) for row, (first, _, _) in zip(ids, rows, strict=True)), [row[2] for row in rows]
    )
    plans = [make_plan(split, schedule, rank, ranks, loss_on=loss_on) for rank in range(ranks)]
    for step in range(min(plans[0].num_steps, 6)):
        micro_batches = [batch for plan in plans for batch in plan.step(step)]
        for batch in micro_batches:
            assert batch["token_type_ids"].dtype == batch["row_labels"].dtype == torch.int64
            assert batch["token_type_ids"].shape == batch["input_ids"].shape
            for i, (tokens, types) in enumerate(zip(batch["input_ids"], batch["token_type_ids"], strict=True)):
                (row,) = batch["rows"][i]
                first, second, label = rows[row]
                assert tokens.tolist() == ids[row] + [PAD] * (len(tokens) - first - second)
                assert types.tolist() == [0] * first + [1] * second + [0] * (len(tokens) - first - second)
                assert batch["row_labels"][i] == label
            counted = (batch["labels"] != NO_LOSS).sum(1)
            expected = torch.zeros(len(counted)) if loss_on == "row" else batch["mask"].sum(1) - 1
            assert torch.equal(counted.float(), expected.float())
        if loss_on == "row":
            assert {batch["tokens_in_global_batch"] for batch in micro_batches} == {schedule.global_batch_size}
            assert sum(len(batch["row_labels"]) for batch in micro_batches) == schedule.global_batch_size


def test_validation_has_the_classes_too():
    split = TokenizedSplit.from_rows([([1, 2], [3]), ([4], []), ([5, 6], [])], [2, 0, 1])
    batches = validation_batches(split, 2, PAD, World(), "row")
    assert [batch["row_labels"].tolist() for batch in batches] == [[2, 0], [1]]
    assert batches[0]["token_type_ids"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert all((batch["labels"] == NO_LOSS).all() for batch in batches)
    assert "row_labels" not in collate(make_split([(1, 1)]), [[0]], PAD, "all")
