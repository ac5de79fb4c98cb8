"""Layers are grouped so that elements end together: compared with every possible split."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hedgehog.pipeline.config_loading import load_config
from hedgehog.pipeline.families import HUB_SHAPES
from hedgehog.pipeline.slurm.gpu_hours import finetune_gpu_hours
from hedgehog.pipeline.slurm.layer_groups import (
    DistillCost,
    balanced_groups,
    distill_cost,
    distill_flops,
    layers_of,
    layers_text,
)

CONFIGS = Path(__file__).parents[3] / "configs"


def best_of_all(layers: list[int], num_groups: int, cost: DistillCost) -> float:
    """The cheapest dearest group over every way to cut the layers."""
    makespans = []
    for num_cuts in range(num_groups):
        for cuts in itertools.combinations(range(1, len(layers)), num_cuts):
            edges = [0, *cuts, len(layers)]
            makespans.append(max(cost.of(layers[a:b]) for a, b in itertools.pairwise(edges)))
    return min(makespans)


@pytest.mark.parametrize("lower_share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("own", [0.05, 0.5, 1.0, 3.0, 40.0])
@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("layers", [list(range(9)), [2, 3, 7, 8, 9, 11], [5]], ids=str)
def test_no_other_split_ends_earlier(own, num_groups, layers, lower_share):
    cost = DistillCost(forward=1.0, own=own, lower_share=lower_share)
    groups = balanced_groups(layers, num_groups, cost)
    assert [layer for group in groups for layer in group] == layers
    assert len(groups) <= num_groups
    assert max(map(cost.of, groups)) == pytest.approx(best_of_all(layers, min(num_groups, len(layers)), cost))


def test_the_upper_layers_come_in_smaller_groups():
    groups = balanced_groups(list(range(32)), 4, DistillCost(forward=1.0, own=3.0))
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    costs = [DistillCost(1.0, 3.0).of(group) for group in groups]
    assert max(costs) < 1.2 * min(costs)


def test_more_elements_than_help_are_not_used():
    """Where a layer's own loss is cheap, the last layer's teacher decides, and two elements are as fast as ten."""
    assert len(balanced_groups(list(range(8)), 8, DistillCost(forward=1.0, own=0.01))) < 8


@pytest.mark.parametrize("size", ["7b", "70b"])
def test_costs_at_llamas_sizes(size):
    config = load_config(CONFIGS / f"llama2-{size}-samsum.yaml")
    shape = HUB_SHAPES[f"meta-llama/Llama-2-{size}-hf"]
    short, long = distill_cost(config, shape, 200), distill_cost(config, shape, 4096)
    assert short.forward == pytest.approx(2 * shape.num_layer_weights, rel=0.05)
    assert long.own > 5 * short.own, "the loss is quadratic in the length"


def test_a_quarter_of_the_rows_costs_a_quarter_of_the_pairs():
    """The loss of a sampled row is as dear as ever, and the maps are applied to all of them."""
    shape = HUB_SHAPES["meta-llama/Llama-2-7b-hf"]
    config = CONFIGS / "llama2-7b-samsum.yaml"
    whole_short, whole = (distill_flops(load_config(config), shape, tokens) for tokens in (200, 4096))
    sampled_short, sampled = (
        distill_flops(load_config(config, ["distill.query_fraction=0.25"]), shape, tokens) for tokens in (200, 4096)
    )
    assert sampled[0] == whole[0], "the teacher runs whole"
    assert sampled[1] - sampled_short[1] == pytest.approx((whole[1] - whole_short[1]) / 4)
    assert sampled[1] > whole[1] / 4


def test_a_measured_cost_takes_the_reckoned_ones_place():
    config = load_config(CONFIGS / "llama2-7b-samsum.yaml", ["slurm.trained_layer_cost=2.5"])
    cost = distill_cost(config, HUB_SHAPES["meta-llama/Llama-2-7b-hf"], 200)
    assert cost.own == 2.5 * cost.forward


@pytest.mark.parametrize(
    ("overrides", "num_rows", "share"),
    [
        (["distill.epochs=4"], None, 1 / 4),
        (["distill.epochs=1"], None, 1),
        (["distill.epochs=0.5"], 100, 1),
        (["distill.max_steps=100", "distill.global_batch_size=8"], 400, 1 / 2),
        (["distill.epochs=4", "distill.cache_hidden_states=false"], None, 1),
    ],
)
def test_kept_hidden_states_make_the_lower_layers_run_once_per_row(overrides, num_rows, share):
    config = load_config(CONFIGS / "llama2-7b-samsum.yaml", ["distill.cache_hidden_states=true", *overrides])
    cost = distill_cost(config, HUB_SHAPES["meta-llama/Llama-2-7b-hf"], 200, num_rows)
    assert cost.lower_share == pytest.approx(share)
    own = 8 * cost.own
    assert cost.of(range(24, 32)) == pytest.approx((8 + 24 * share) * cost.forward + own)
    assert cost.of(range(8)) == pytest.approx(8 * cost.forward + own), "nothing lies below layer 0"


def test_zero_3_waits_for_weights_where_a_micro_batch_is_small():
    """1.5 GB of a layer's weights at 200 GB/s are 7.5 ms, the arithmetic of 256 tokens is 3.5 ms, of 1024 is 14 ms."""
    shape, config = HUB_SHAPES["meta-llama/Llama-2-70b-hf"], load_config(CONFIGS / "llama2-70b-samsum.yaml")
    forward, _ = distill_flops(config, shape, 256)
    waits = distill_cost(config, shape, 256, num_gpus=8).forward
    assert waits / forward == pytest.approx(7.5 / 3.5, rel=0.02)
    assert distill_cost(config, shape, 256, num_gpus=1).forward == forward, "nothing to gather"
    larger = load_config(
        CONFIGS / "llama2-70b-samsum.yaml", ["distill.micro_batch_size=4", "distill.global_batch_size=32"]
    )
    assert distill_cost(larger, shape, 256, num_gpus=8).forward == forward
    hours = [finetune_gpu_hours(config, shape, 256, 1000, num_gpus) or 0 for num_gpus in (1, 8)]
    # two passes of gathering against three of arithmetic
    assert hours[1] / hours[0] == pytest.approx(2 * waits / (3 * forward), rel=0.05)


def test_layers_as_text_and_back():
    for text in ("0-7", "0-3,8,10-11", "5"):
        assert layers_text(layers_of(text)) == text
