"""DeepSpeed's settings, and the engine's arithmetic on a module of one weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hedgehog.pipeline.config import EngineConfig
from hedgehog.pipeline.deepspeed_import import import_deepspeed
from hedgehog.pipeline.deepspeed_settings import deepspeed_settings, frozen_settings
from hedgehog.pipeline.distributed import World
from hedgehog.pipeline.engine import TrainingEngine, build_engine, release_deepspeed, shard_frozen
from hedgehog.pipeline.errors import CheckpointError, ConfigError

REPOSITORY = Path(__file__).parents[2]
WORLD = World(0, 1, 0, torch.device("cpu"))


def settings(**engine: Any) -> dict[str, Any]:
    return deepspeed_settings(
        EngineConfig(device="cpu", **engine),
        micro_batch_size=2,
        num_accumulation=4,
        gradient_clip=0.5,
        num_trainable=1000,
        largest_parameter=400,
    )


def write_json(tmp_path: Path, content: dict[str, Any]) -> str:
    file = tmp_path / "expert.json"
    file.write_text(json.dumps(content))
    return str(file)


def test_deepspeeds_own_functions_are_not_compiled() -> None:
    """torch's compiler would be a second of every start, for an optimizer that nothing here uses."""
    import_deepspeed()
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon import original_muon

    assert not hasattr(original_muon.muon_update, "_torchdynamo_orig_callable")
    assert hasattr(compiler.compile()(lambda: None), "_torchdynamo_orig_callable"), "what DeepSpeed compiles later"


def test_settings_follow_the_yaml() -> None:
    made = settings(zero_stage=2, offload_optimizer=True)
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "bf16" not in made


def test_an_experts_json_is_merged(tmp_path: Path) -> None:
    expert = {
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 123456, "overlap_comm": False},
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False},
        "wall_clock_breakdown": True,
    }
    made = settings(zero_stage=2, deepspeed_config=write_json(tmp_path, expert))
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 123456
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("expert", "keys"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage", "engine.zero_stage"]),
        ({"bf16": {"enabled": True}}, ["bf16", "engine.precision"]),
        ({"optimizer": {"type": "Adam"}, "gradient_clipping": 1.0}, ["optimizer", "gradient_clip"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["engine.offload_optimizer"]),
    ],
)
def test_a_contradiction_names_both_keys(tmp_path: Path, expert: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        settings(zero_stage=2, deepspeed_config=write_json(tmp_path, expert))
    assert all(key in str(error.value) for key in keys)


def test_an_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        settings(deepspeed_config=str(tmp_path / "missing.json"))
    (tmp_path / "expert.json").write_text("{,}")
    with pytest.raises(ConfigError, match="not JSON"):
        settings(deepspeed_config=str(tmp_path / "expert.json"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_in_configs_deepspeed_fit_their_stage(stage: int) -> None:
    file = REPOSITORY / f"configs/deepspeed/zero{stage}.json"
    assert settings(zero_stage=stage, deepspeed_config=str(file))["zero_optimization"]["overlap_comm"] is True
    with pytest.raises(ConfigError):
        settings(zero_stage=0, deepspeed_config=str(file))


class Line(nn.Module):
    """loss = Σ weight·x: the gradient is x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0, 0.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


def line_engine(stage: int, *, num_accumulation: int = 1, **options: Any) -> TrainingEngine:
    module = Line()
    config = EngineConfig(zero_stage=stage, device="cpu", precision="float32", **options.pop("config", {}))
    return build_engine(
        module,
        [{"params": [module.weight], "peak_learning_rate": 0.1}],
        config=config,
        world=WORLD,
        micro_batch_size=1,
        num_accumulation=num_accumulation,
        gradient_clip=options.pop("gradient_clip", None),
        adam_beta2=0.99,
        weight_decay=0.0,
        **options,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_micro_batches_add_up(stage: int) -> None:
    """The norm is that of the sum, not of the mean, and Adam's first step is the learning rate."""
    engine = line_engine(stage, num_accumulation=3)
    for x in ([3.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 2.0, 0, 0]):
        engine.backward(engine(torch.tensor(x)))
    assert engine.step(0.5) == pytest.approx(5.0)
    expected = torch.tensor([3 - 0.05, 4 - 0.05, 0, 0])
    assert torch.allclose(engine.full_weights()["weight"], expected, atol=1e-6)
    engine.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_no_weight(stage: int) -> None:
    engine = line_engine(stage)
    engine.backward(engine(torch.tensor([1.0, torch.nan, 0, 0])))
    assert not torch.isfinite(torch.tensor(engine.step(1.0)))
    assert torch.equal(engine.full_weights()["weight"], torch.tensor([3.0, 4.0, 0.0, 0.0]))
    engine.close()


@pytest.mark.parametrize("stage", [0, 2])
def test_clipping(stage: int) -> None:
    """Adam's moments tell the clipped gradient: 0.1 of it, after one step."""
    engine = line_engine(stage, gradient_clip=1.0)
    engine.backward(engine(torch.tensor([3.0, 4.0, 0, 0])))
    assert engine.step(1.0) == pytest.approx(5.0)
    moment = engine.checkpoint_files()["optimizer.safetensors"]["exp_avg/weight"]
    assert torch.allclose(moment, 0.1 * torch.tensor([0.6, 0.8, 0, 0]), atol=1e-5)
    engine.close()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for tensors, message in (
        ({"bias": torch.zeros(4)}, "other weights"),
        ({"weight": torch.zeros(5)}, r"shape \(5,\)"),
    ):
        save_file(tensors, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match=message):
            line_engine(1, resume_from=tmp_path)


def test_zero3_leaves_torch_as_it_was() -> None:
    linear = nn.functional.linear
    line_engine(3).close()
    assert nn.functional.linear is linear
    release_deepspeed()
    assert nn.functional.linear is linear


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="zero_stage"):
        line_engine(0, config={"offload_optimizer": True})
    with pytest.raises(ConfigError, match="adamw"):
        line_engine(1, config={"offload_optimizer": True}, optimizer="adamw8bit")


@pytest.mark.parametrize("stage", [1, 3])
def test_the_offloaded_optimizer_resumes(stage: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def one_step(engine: TrainingEngine, x: float) -> None:
        engine.backward(engine(torch.tensor([x, 1.0, 2.0, -1.0])))
        engine.step(1.0)

    config = {"offload_optimizer": True}
    engine = line_engine(stage, config=config)
    one_step(engine, 1.0)
    for name, tensors in engine.checkpoint_files().items():
        save_file(tensors, tmp_path / name)
    layout = engine.layout()
    one_step(engine, 3.0)
    expected = engine.full_weights()["weight"]
    engine.close()

    resumed = line_engine(stage, config=config, resume_from=tmp_path, resume_layout=layout, step=1)
    one_step(resumed, 3.0)
    assert torch.equal(resumed.full_weights()["weight"], expected)
    resumed.close()


def test_a_frozen_module_has_one_layer_whole_at_a_time() -> None:
    """And a layer fetched ahead, with one matrix too many; not a billion weights, which DeepSpeed's limits allow."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    layers = nn.ModuleList(
        nn.Sequential(nn.Linear(32, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 32, bias=False)) for _ in range(8)
    )
    tower = nn.Sequential(*layers)
    x = torch.randn(2, 32)
    expected = tower(x)
    sharded = shard_frozen(
        tower.requires_grad_(False), layers, config=EngineConfig(zero_stage=3, device="cpu"), world=WORLD
    )
    whole: list[int] = []

    def look(*_: Any) -> None:
        matrices = [p for p in layers.parameters() if len(p.ds_shape) == 2]
        whole.append(sum(p.ds_numel for p in matrices if p.ds_status != ZeroParamStatus.NOT_AVAILABLE))

    for layer in layers:
        layer[2].register_forward_pre_hook(look)  # after DeepSpeed's own, which gathers
    for _ in range(4):  # the second is recorded; from the third on modules are fetched ahead
        assert torch.allclose(sharded(x), expected)
    assert len(whole) == 32 and min(whole) >= 64 * 32 and max(whole) <= (2 + 2 + 1) * 64 * 32
    sharded.destroy()
    release_deepspeed()


def test_an_experts_json_reaches_the_frozen_module(tmp_path: Path) -> None:
    asked = {"stage": 3, "stage3_max_live_parameters": 77, "offload_optimizer": {"device": "cpu"}}
    file = write_json(tmp_path, {"zero_optimization": asked, "gradient_clipping": 1.0})
    zero = frozen_settings(EngineConfig(zero_stage=3, deepspeed_config=file), layer_size=100, keep_size=8)
    assert zero["zero_optimization"]["stage3_max_live_parameters"] == 77
    assert zero["zero_optimization"]["stage3_prefetch_bucket_size"] == 100
    assert "offload_optimizer" not in zero["zero_optimization"]
