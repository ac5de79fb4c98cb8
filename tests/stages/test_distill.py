"""Distill: resumes bit for bit, layers are independent, batches may be split in any way, faults lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hedgehog.pipeline import distillation
from hedgehog.pipeline.errors import CheckpointError, ConfigError, ModelError, NonFiniteLossError
from hedgehog.pipeline.feature_map_file import read_feature_maps
from hedgehog.pipeline.manifest import read_manifest
from hedgehog.pipeline.modeling import load_base
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.runner import merge_layers

MAPS = "distill/feature_maps.safetensors"
Run = Any


@pytest.fixture(scope="module")
def finished(new_run: Callable[..., Run]) -> Run:
    """An uninterrupted run of all layers."""
    run = new_run()
    run.stage("distill")
    return run


def test_maps_learn(finished: Run, new_run: Callable[..., Run]) -> None:
    untrained = new_run(distill__enabled=False)
    start = untrained.stage("distill").summary
    end = finished.stage("distill").summary  # done already: reads the manifest
    assert end["kl_mean"] < start["kl_mean"]
    assert len(end["kl_per_layer"]) == 3
    assert [len(kl_H) for kl_H in end["kl_per_head"]] == [4, 4, 4]
    assert end["kl_mean"] == pytest.approx(finished.metrics("distill")[-1]["validation_kl_nats"])
    assert end["steps"] == 4
    assert end["tokens"] == sum(record["tokens"] for record in finished.metrics("distill"))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 2), (3, 3), (3, 1), (0, 3)])
def test_resumed_equals_uninterrupted(
    before: int, after: int, finished: Run, new_run: Callable[..., Run], interrupt: Callable[..., None]
) -> None:
    """Under every ZeRO stage, and from one stage to another: same weights and same records, to the bit."""
    run = new_run(engine__zero_stage=before)
    interrupt(run, "distill")
    assert not (run.root / MAPS).exists()
    run = run.changed(engine__zero_stage=after)
    assert run.stage("distill").num_resumes == 1
    run.assert_same_tensors(finished, MAPS)
    assert read_feature_maps(run.root / MAPS)[1] == read_feature_maps(finished.root / MAPS)[1]
    for record, expected in zip(run.metrics("distill"), finished.metrics("distill"), strict=True):
        # every stage adds up the squares of the gradient in its own order
        assert record.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-6)
        assert record == expected


def test_a_subset_of_layers_learns_the_same_alone(finished: Run, new_run: Callable[..., Run]) -> None:
    run = new_run(distill__save_every_steps=50)
    run.changed(distill__layers="0,2").stage("distill")
    with pytest.raises(CheckpointError, match="layers 1 are missing"):
        merge_layers(run.config)
    run.changed(distill__layers="1").stage("distill")
    merged = merge_layers(run.config)
    run.assert_same_tensors(finished, MAPS)
    expected = finished.stage("distill").summary
    assert merged.summary["kl_per_head"] == expected["kl_per_head"]
    parts = [read_manifest(folder) for folder in RunFolder(run.root).subsets()]
    assert len(parts) == 2 and merged.duration_s < min(part.duration_s for part in parts)
    assert merged.summary["parts_duration_s"] == sum(part.duration_s for part in parts)
    assert merged.summary["parts_peak_memory_bytes"] == max(part.peak_memory_bytes for part in parts)
    assert read_feature_maps(run.root / MAPS)[1] == read_feature_maps(finished.root / MAPS)[1]


def test_merge_refuses_what_does_not_belong_together(new_run: Callable[..., Run]) -> None:
    run = new_run(distill__enabled=False)
    run.changed(distill__layers="0-1").stage("distill")
    run.changed(distill__layers="1-2").stage("distill")
    with pytest.raises(CheckpointError, match="layer 1 is in layers-0-1 and in layers-1-2"):
        merge_layers(run.config)
    other = new_run(distill__enabled=False)
    other.changed(distill__layers="0-2", distill__learning_rate=0.5).stage("distill")
    with pytest.raises(CheckpointError, match="another config"):
        merge_layers(other.config)


def test_a_layer_that_does_not_exist(new_run: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="layer 7; the model has layers 0 to 2"):
        new_run(distill__layers="1,7").stage("distill")


def test_a_step_does_not_depend_on_the_split_of_its_batch(new_run: Callable[..., Run]) -> None:
    whole, split = (
        new_run(distill__gradient_clip=None, distill__micro_batch_size=size, distill__save_every_steps=50)
        for size in (4, 1)
    )
    whole.stage("distill")
    split.stage("distill")
    for one, other in zip(whole.metrics("distill"), split.metrics("distill"), strict=True):
        assert one.pop("layer_grad_norm_max") > 0
        other.pop("layer_grad_norm_max")  # a mean of norms, not the norm of a mean
        assert one == pytest.approx(other, rel=1e-4)


def test_clipping_bounds_a_layers_gradient(new_run: Callable[..., Run]) -> None:
    clip = 1e-3
    run = new_run(distill__gradient_clip=clip, distill__max_steps=1)
    run.stage("distill")
    record = run.metrics("distill")[0]
    assert record["layer_grad_norm_max"] > 10 * clip
    assert record["grad_norm"] <= clip * 3**0.5 * 1.001  # three layers, each at most `clip`


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("zero1", 1e-6),
        ("zero2", 1e-6),
        ("zero3", 1e-6),
        ("zero3 offload", 1e-6),
        ("zero3 wide", 1e-6),
        ("zero2 bfloat16", 1e-5),
    ],
)
def test_two_processes_learn_the_same(
    key: str, near: float, two_process_runs: dict[Any, Run], one_process_run: Callable[[str], Run]
) -> None:
    """The same losses, KL and maps; `wide` also shows that maps with random parts start right under ZeRO-3."""
    run, alone = two_process_runs[key], one_process_run(key)
    expected = alone.stage("distill").summary
    assert run.losses("distill") == pytest.approx(alone.losses("distill"), rel=near)
    kl = run.stage("distill").summary["kl_per_head"]
    assert [x for row in kl for x in row] == pytest.approx(
        [x for row in expected["kl_per_head"] for x in row], rel=1e-4
    )
    maps, expected_maps = run.tensors(MAPS), alone.tensors(MAPS)
    assert maps.keys() == expected_maps.keys()
    for name, weight_HDP in maps.items():
        assert weight_HDP.shape == (4, 8, 24 if key == "zero3 wide" else 8)
        # Adam's step has the sign of a gradient that may be nothing but a rounding
        assert (weight_HDP - expected_maps[name]).abs().median() < 1e-5, name


def test_another_number_of_processes_may_resume(two_process_runs: dict[Any, Run], finished: Run) -> None:
    run = two_process_runs["distill"]
    assert not (run.root / MAPS).exists()
    manifest = run.stage("distill")
    assert manifest.num_resumes == 1
    assert manifest.world_size == 1
    assert run.losses("distill") == pytest.approx(finished.losses("distill"), rel=1e-4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_names_layer_and_head(
    what: str, new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run()
    layer_loss = distillation.FeatureMapDistillation._layer_loss
    calls = []

    def poisoned(self: Any, seen: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, kl_H = layer_loss(self, seen, *inputs)
        calls.append(seen.layer_index)
        if len(calls) > 3 * 2 * 2 and seen.layer_index == 1:  # third step: layers x micro-batches x steps
            poison = torch.tensor([0, 0, torch.nan, 0])
            if what == "loss":
                return loss, kl_H + poison
            weight = self.layers["1"]["feature_map_k"].weight
            loss = loss + (weight * poison[:, None, None]).sum().nan_to_num()
        return loss, kl_H

    with monkeypatch.context() as patch:
        patch.setattr(distillation.FeatureMapDistillation, "_layer_loss", poisoned)
        with pytest.raises(NonFiniteLossError) as error:
            run.stage("distill")
    message = str(error.value)
    assert f"step 3: the {what} of layer 1, head 2" in message
    assert "step-000002" in message
    assert "learning_rate" in message
    kept = [folder.name for folder in (run.root / "distill/checkpoints").iterdir()]
    assert kept == ["step-000002"]


def test_a_base_that_is_not_finite_is_named(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its maps have not moved at the first step: no rate of theirs is to blame."""
    run, load, name = new_run(), load_base.load_prepared_base, "model.layers.1.mlp.up_proj.weight"

    def poisoned(*arguments: Any, **options: Any) -> Any:
        base = load(*arguments, **options)
        with torch.no_grad():
            base.get_parameter(name)[3, 4] = torch.nan
        return base

    monkeypatch.setattr(load_base, "load_prepared_base", poisoned)
    with pytest.raises(ModelError, match=rf"{name} holds NaN or infinity: nothing can be learned from it"):
        run.stage("distill")


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_handed_the_teachers_log_sum_exp(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """In training and in validation; it is that of q and k."""
    select = distillation.select_distill_backend
    seen = {True: 0, False: 0}

    def spying(*arguments: Any, **options: Any) -> Any:
        def loss(q: torch.Tensor, k: torch.Tensor, *maps: Any, log_sum_exp_BHL: torch.Tensor, **more: Any) -> Any:
            seen[more.get("grad", True)] += 1
            last = more["mask_BL"].sum(dim=1) - 1  # right padding
            for row, end in enumerate(last.tolist()):
                first = 0
                if more["segment_ids_BL"] is not None:
                    first = int((more["segment_ids_BL"][row] == more["segment_ids_BL"][row, end]).nonzero()[0])
                keys = k[row].repeat_interleave(q.shape[1] // k.shape[1], dim=0)[:, first : end + 1]
                expected = (more["scale"] * keys @ q[row, :, end, :, None]).logsumexp(dim=1)[:, 0]
                torch.testing.assert_close(log_sum_exp_BHL[row, :, end], expected)
            return backend.loss(q, k, *maps, log_sum_exp_BHL=log_sum_exp_BHL, **more)

        backend = select(*arguments, **options)
        return backend._replace(loss=loss)

    monkeypatch.setattr(distillation, "select_distill_backend", spying)
    new_run(distill__packing=packing, distill__max_steps=1).stage("distill")
    assert seen[True] > 0 and seen[False] > 0


def test_attention_weights_that_would_be_large_are_refused(
    new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no fused kernel for the teacher."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from hedgehog.kernels import softmax_attention

    monkeypatch.setattr(softmax_attention, "MATERIALISED_LIMIT_BYTES", 2 * 4 * 8 * 8 * 4)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(ConfigError, match=r"no fused attention.*data\.max_length_tokens"):
        new_run().stage("distill")


@pytest.mark.parametrize(("quantization", "near"), [("nf4", 0.1), ("int8", 0.005)])
def test_a_quantized_teacher(quantization: str, near: float, new_run: Callable[..., Run], finished: Run) -> None:
    """Other figures than the teacher's own weights give, and near them; the maps are fp32 and learn."""
    run = new_run(model__quantization=quantization)
    kl, expected_kl = (r.stage("distill").summary["kl_mean"] for r in (run, finished))
    losses, expected = run.losses("distill"), finished.losses("distill")
    assert losses[0] != expected[0]
    assert losses == pytest.approx(expected, rel=near)
    assert kl == pytest.approx(expected_kl, rel=2 * near)
    maps = run.tensors(MAPS)
    assert len(maps) == 6
    for weight_HDF in maps.values():
        assert weight_HDF.dtype == torch.float32
        assert not torch.equal(weight_HDF, torch.eye(8).expand(4, 8, 8))
    with pytest.raises(ConfigError, match="cannot shard quantized"):
        new_run(model__quantization=quantization, engine__zero_stage=3).stage("distill")


def test_a_checkpoint_holds_what_learns_only(finished: Run) -> None:
    """The maps, 12 bytes a weight with AdamW's moments; not the teacher's weights."""
    folder = finished.root / "distill/checkpoints/step-000004"
    names = set(finished.tensors(MAPS))
    assert len(names) == 6
    assert set(finished.tensors("distill/checkpoints/step-000004/weights.safetensors")) == names
    moments = set(finished.tensors("distill/checkpoints/step-000004/optimizer.safetensors"))
    assert moments == {f"{moment}/{name}" for moment in ("exp_avg", "exp_avg_sq") for name in names}
    num_bytes = 12 * 6 * 4 * 8 * 8
    assert num_bytes < sum(file.stat().st_size for file in folder.iterdir()) < num_bytes + 8192


def test_softmax_attention_has_nothing_to_distill(new_run: Callable[..., Run]) -> None:
    manifest = new_run(model__attention="softmax").stage("distill")
    assert manifest.skipped
    assert not manifest.artifacts


@pytest.mark.parametrize(
    "overrides", [{"distill__enabled": False, "engine__zero_stage": 3}, {"model__feature_map": "elu"}]
)
def test_maps_that_do_not_train_are_measured(overrides: dict[str, Any], new_run: Callable[..., Run]) -> None:
    """Also under ZeRO-3, where weights that the base lacks must still get their initial values."""
    run = new_run(**overrides)
    manifest = run.stage("distill")
    assert manifest.summary["kl_mean"] > 0
    assert manifest.summary["trained"] is False
    maps, metadata = read_feature_maps(run.root / MAPS)
    assert metadata["layers"] == [0, 1, 2]
    assert len(maps) == (6 if "distill__enabled" in overrides else 0)
    for weight_HDF in maps.values():
        assert torch.equal(weight_HDF, torch.eye(8).expand(4, 8, 8))


def test_packed_sequences_and_output_error(new_run: Callable[..., Run]) -> None:
    run = new_run(
        distill__packing=True,
        distill__output_mse_weight=1.0,
        distill__cross_entropy_weight=0.0,
        distill__max_steps=2,
        distill__micro_batch_size=1,
        distill__global_batch_size=2,
    )
    assert run.stage("distill").summary["kl_mean"] > 0
    assert run.losses("distill")[0] < 10, "it is counted in the outputs' variance"


def test_a_part_of_the_query_rows(finished: Run, new_run: Callable[..., Run], interrupt: Callable[..., None]) -> None:
    """Other losses than with all rows, towards the same maps; a layer alone draws the same rows, a resumed run too."""
    sampling = {"distill__query_fraction": 0.5, "distill__query_block": 16}
    run = new_run(**sampling)
    summary = run.stage("distill").summary
    assert run.losses("distill") != finished.losses("distill")
    assert summary["kl_mean"] == pytest.approx(finished.stage("distill").summary["kl_mean"], rel=0.05)
    resumed = new_run(**sampling)
    interrupt(resumed, "distill")
    resumed.stage("distill")
    resumed.assert_same_tensors(run, MAPS)
    subset = new_run(**sampling)
    for layers in ("0,2", "1"):
        subset.changed(distill__layers=layers).stage("distill")
    merge_layers(subset.config)
    subset.assert_same_tensors(run, MAPS)
