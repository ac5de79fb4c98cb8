"""Finetune: resumes bit for bit, adapters come out whole under every ZeRO stage, the loss is the summaries' only."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hedgehog.pipeline.errors import ConfigError, NonFiniteLossError

ADAPTER = "finetune/adapter/adapter_model.safetensors"
MAPS = "finetune/feature_maps.safetensors"
Run = Any


@pytest.fixture(scope="module")
def finished(new_run: Callable[..., Run]) -> Run:
    """An uninterrupted run of both stages."""
    run = new_run()
    run.stage("distill")
    run.stage("finetune")
    return run


@pytest.fixture(scope="module")
def distilled(finished: Run, new_run: Callable[..., Run]) -> Callable[..., Run]:
    """A run with `finished`'s distill stage and nothing finetuned."""
    import shutil

    def make(**overrides: Any) -> Run:
        run = new_run(**overrides)
        shutil.copytree(finished.root / "distill", run.root / "distill")
        return run

    return make


@pytest.fixture(scope="module")
def unclipped(distilled: Callable[..., Run]) -> Run:
    """An uninterrupted run without gradient clipping."""
    run = distilled(finetune__gradient_clip=None)
    run.stage("finetune")
    return run


# rank 64: with fewer than 4096 numbers bitsandbytes keeps fp32 states
EIGHT_BIT = {"finetune__optimizer": "adamw8bit", "finetune__lora__rank": 64}


@pytest.fixture(scope="module")
def finished_in_8bit(distilled: Callable[..., Run]) -> Run:
    """An uninterrupted run with the 8-bit optimizer."""
    run = distilled(**EIGHT_BIT)
    run.stage("finetune")
    return run


def assert_same_last_steps(run: Run, other: Run) -> None:
    """The steps after the interruption move the weights alike. Without its moments Adam would go elsewhere."""

    def moves(run: Run) -> torch.Tensor:
        before, after = (run.tensors(f"finetune/checkpoints/step-00000{n}/weights.safetensors") for n in (2, 4))
        return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])

    expected = moves(other)
    assert (moves(run) - expected).norm() < 0.02 * expected.norm()


def assert_same_records(run: Run, other: Run) -> None:
    for record, expected in zip(run.metrics("finetune"), other.metrics("finetune"), strict=True):
        # every ZeRO stage adds up the squares of the gradient in its own order
        assert record.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-6)
        assert record == expected


def test_the_summaries_are_learned(finished: Run) -> None:
    summary = finished.stage("finetune").summary
    assert summary["steps"] == 4
    assert summary["validation_loss"] == finished.metrics("finetune")[-1]["validation_loss_nats"]
    # 3 layers, rank 4: A and B of q, o (32 x 32) and k, v (32 x 16), and the two maps of 4 heads of 8 x 8
    assert summary["trained_weights"] == 3 * (4 * (64 + 64 + 48 + 48) + 2 * 4 * 8 * 8)
    moved = [name for name, w in finished.tensors(ADAPTER).items() if "lora_B" in name and w.abs().sum() > 0]
    assert len(moved) == 12
    distilled, trained = finished.tensors("distill/feature_maps.safetensors"), finished.tensors(MAPS)
    assert all(not torch.equal(trained[name], distilled[name]) for name in distilled)


def test_the_loss_is_the_mean_over_summary_tokens(distilled: Callable[..., Run]) -> None:
    """The first step's loss, against transformers' own on the whole rows of the same batch."""
    from transformers import LlamaForCausalLM

    from hedgehog.pipeline.data.batches import BatchPlan
    from hedgehog.pipeline.data.tokens import TokenizedSplit
    from hedgehog.pipeline.distributed import World

    run = distilled(model__attention="softmax", finetune__max_steps=1)
    run.stage("finetune")
    config = run.config
    split = TokenizedSplit.open(run.root / "prepare/tokens_train.safetensors")
    world = World(0, 1, 0, torch.device("cpu"))
    plan = BatchPlan(split, config.finetune, config.data.max_length_tokens, 0, config.seed, world)
    model = LlamaForCausalLM.from_pretrained(run.root / "prepare/base_model")
    total, count = 0.0, 0
    for row in (row for sequence in plan.global_batch(0) for row in sequence):
        input_ids, prompt_length = split[row]
        log_p = model(input_ids[None]).logits[0].detach().log_softmax(-1)
        for position in range(prompt_length, len(input_ids)):
            total -= float(log_p[position - 1, input_ids[position]])
            count += 1
    assert run.losses("finetune")[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 2), (3, 3), (3, 1), (0, 2)])
def test_resumed_equals_uninterrupted(
    before: int, after: int, unclipped: Run, distilled: Callable[..., Run], interrupt: Callable[..., None]
) -> None:
    """Under every ZeRO stage, and from one to another.

    The stages round the factor of the common gradient clipping differently, so that is off here; ZeRO-3 computes linear
    layers its own way, so it is compared with itself.
    """
    run = distilled(engine__zero_stage=before, finetune__gradient_clip=None)
    interrupt(run, "finetune")
    run = run.changed(engine__zero_stage=after)
    run.stage("finetune")
    expected = unclipped
    if before == after == 3:
        expected = distilled(engine__zero_stage=3, finetune__gradient_clip=None)
        expected.stage("finetune")
    if before == after or 3 not in (before, after):
        run.assert_same_tensors(expected, ADAPTER, MAPS)
        assert_same_records(run, expected)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            written = [(r.root / "finetune/adapter" / name).read_bytes() for r in (run, expected)]
            assert written[0] == written[1]
    assert run.losses("finetune") == pytest.approx(unclipped.losses("finetune"), rel=1e-4)


@pytest.mark.parametrize(
    ("key", "near"),
    [("zero1", 1e-5), ("zero2", 1e-5), ("zero3", 1e-5), ("zero3 offload", 1e-5), ("zero2 bfloat16", 1e-3)],
)
def test_two_processes_learn_the_same(
    key: str, near: float, two_process_runs: dict[Any, Run], one_process_run: Callable[[str], Run]
) -> None:
    run, alone = two_process_runs[key], one_process_run(key)
    alone.stage("distill")
    alone.stage("finetune")
    assert run.losses("finetune") == pytest.approx(alone.losses("finetune"), rel=near)
    adapter, expected = run.tensors(ADAPTER), alone.tensors(ADAPTER)
    assert {name: t.shape for name, t in adapter.items()} == {name: t.shape for name, t in expected.items()}
    for name, tensor in adapter.items():
        assert (tensor - expected[name]).abs().median() < (1e-5 if near < 1e-3 else 1e-3), name


@pytest.mark.parametrize("interrupted", ["finetune", "finetune 2", "finetune 3", "finetune 8bit"])
def test_fewer_processes_may_resume(
    interrupted: str, two_process_runs: dict[Any, Run], finished: Run, finished_in_8bit: Run
) -> None:
    run = two_process_runs[interrupted]
    assert not (run.root / ADAPTER).exists()
    before = run.metrics("finetune")
    manifest = run.stage("finetune")
    assert manifest.num_resumes == 1
    assert run.metrics("finetune")[:2] == before[:2]
    assert run.metrics("finetune")[2]["loss_nats"] == pytest.approx(before[2]["loss_nats"], rel=1e-4)
    assert_same_last_steps(run, finished_in_8bit if "8bit" in interrupted else finished)


def test_more_processes_may_resume(
    distilled: Callable[..., Run],
    finished: Run,
    finished_in_8bit: Run,
    interrupt: Callable[..., None],
    launch: Callable[..., list[str]],
) -> None:
    runs = [(distilled(engine__zero_stage=stage), finished) for stage in (1, 2, 3)]
    runs.append((distilled(**EIGHT_BIT), finished_in_8bit))
    for run, _ in runs:
        interrupt(run, "finetune")
    launch([(run, "finetune", None) for run, _ in runs])
    for run, expected in runs:
        manifest = json.loads((run.root / "finetune/manifest.json").read_text())
        assert (manifest["status"], manifest["world_size"], manifest["num_resumes"]) == ("done", 2, 1)
        assert run.losses("finetune") == pytest.approx(expected.losses("finetune"), rel=1e-3)
        assert_same_last_steps(run, expected)


def test_the_8bit_optimizer_resumes_to_the_bit_in_its_own_layout(
    distilled: Callable[..., Run], finished_in_8bit: Run, interrupt: Callable[..., None]
) -> None:
    run = distilled(**EIGHT_BIT)
    interrupt(run, "finetune")
    run.stage("finetune")
    saved = run.tensors("finetune/checkpoints/step-000004/optimizer-00000.safetensors")
    assert saved["0/state1"].dtype == torch.uint8
    run.assert_same_tensors(finished_in_8bit, ADAPTER, MAPS)
    assert_same_records(run, finished_in_8bit)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_8bit_optimizer_resumes_under_another_zero_stage(
    stage: int, distilled: Callable[..., Run], finished_in_8bit: Run, interrupt: Callable[..., None]
) -> None:
    """From ZeRO-1."""
    run = distilled(**EIGHT_BIT)
    interrupt(run, "finetune")
    run = run.changed(engine__zero_stage=stage)
    run.stage("finetune")
    assert_same_last_steps(run, finished_in_8bit)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_trains(quantization: str, distilled: Callable[..., Run]) -> None:
    run = distilled(model__quantization=quantization, engine__precision="bfloat16", finetune__max_steps=2)
    summary = run.stage("finetune").summary
    assert 0 < summary["validation_loss"] < 20
    assert all(tensor.dtype == torch.float32 for tensor in run.tensors(ADAPTER).values())
    with pytest.raises(ConfigError, match="cannot shard quantized"):
        distilled(model__quantization=quantization, engine__zero_stage=3).stage("finetune")


def test_bfloat16_weights_with_float32_learning(
    distilled: Callable[..., Run], finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distilled(engine__precision="bfloat16")
    run.stage("finetune")
    line = "linear attention: torch (no compiled kernel for cpu, bfloat16, F=16, V=8: it needs a CUDA GPU)"
    shown = capsys.readouterr().out
    assert shown.count(line) == 1
    loss = run.metrics("finetune")[-1]["validation_loss_nats"]
    assert f"loss on the validation rows: {loss:.4f} nats a token" in shown
    for path in (ADAPTER, MAPS):
        assert all(tensor.dtype == torch.float32 for tensor in run.tensors(path).values())
    assert run.losses("finetune") == pytest.approx(finished.losses("finetune"), rel=0.03)


def test_a_checkpoint_holds_what_learns_only(finished: Run) -> None:
    """The adapter and the maps, 12 bytes a weight with AdamW's moments; nothing of the base."""
    folder = finished.root / "finetune/checkpoints/step-000004"
    weights = finished.tensors("finetune/checkpoints/step-000004/weights.safetensors")
    assert sum("lora_" in name for name in weights) == 3 * 4 * 2
    assert sum("feature_map_" in name for name in weights) == len(weights) - 24 == 6
    num_bytes = 12 * finished.stage("finetune").summary["trained_weights"]
    assert num_bytes < sum(file.stat().st_size for file in folder.iterdir()) < num_bytes + 32768


def test_softmax_attention_is_the_baseline(distilled: Callable[..., Run]) -> None:
    """What it saves fits a plain Llama."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    run = distilled(model__attention="softmax")
    manifest = run.stage("finetune")
    assert set(manifest.artifacts) == {"adapter"}
    llama = LlamaForCausalLM.from_pretrained(run.root / "prepare/base_model")
    adapted = PeftModel.from_pretrained(llama, run.root / "finetune/adapter")
    weights = {n.replace(".default.", "."): p for n, p in adapted.named_parameters() if "lora_" in n}
    for name, tensor in run.tensors(ADAPTER).items():
        assert torch.equal(weights[name], tensor)


def test_maps_may_stay_as_they_were_distilled(distilled: Callable[..., Run], finished: Run) -> None:
    run = distilled(finetune__train_feature_maps=False, finetune__max_steps=1)
    run.stage("finetune")
    assert (run.root / MAPS).read_bytes() == (run.root / "distill/feature_maps.safetensors").read_bytes()


def test_maps_have_their_own_learning_rate(distilled: Callable[..., Run]) -> None:
    """Adam's first step moves every weight by its learning rate."""
    run = distilled(finetune__feature_map_learning_rate=1e-5, finetune__max_steps=1, finetune__lr_schedule="constant")
    run.stage("finetune")
    before, after = run.tensors("distill/feature_maps.safetensors"), run.tensors(MAPS)
    largest = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert largest == pytest.approx(1e-5, rel=0.1)


@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_packed_sequences_give_the_loss_of_their_rows(attention: str, distilled: Callable[..., Run]) -> None:
    """Every row alone, and all rows of a step joined: the same mean loss, as no row sees another."""
    everything = {"finetune__max_steps": 1, "model__attention": attention, "data__max_length_tokens": 128}
    rows = distilled(**everything, finetune__global_batch_size=12, finetune__micro_batch_size=1)
    packed = distilled(
        **everything, finetune__packing=True, finetune__global_batch_size=2, finetune__micro_batch_size=2
    )
    rows.stage("finetune")
    packed.stage("finetune")
    assert rows.metrics("finetune")[0]["tokens"] == packed.metrics("finetune")[0]["tokens"]
    assert packed.losses("finetune") == pytest.approx(rows.losses("finetune"), rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputing_layers_changes_nothing(
    stage: int, distilled: Callable[..., Run], finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hedgehog.pipeline.llama.modeling_hedgehog_llama import HedgehogLlamaAttention

    calls = []
    forward = HedgehogLlamaAttention.forward
    monkeypatch.setattr(
        HedgehogLlamaAttention,
        "forward",
        lambda self, *args, **kwargs: (calls.append(self.training), forward(self, *args, **kwargs))[1],
    )
    run = distilled(finetune__gradient_checkpointing=True, engine__zero_stage=stage)
    run.stage("finetune")
    assert run.losses("finetune") == pytest.approx(finished.losses("finetune"), rel=1e-4)
    assert sum(calls) == 2 * 3 * 4 * 2  # twice, in each layer, at each step, for each micro-batch


def test_dropout_repeats_itself_after_a_resume(distilled: Callable[..., Run], interrupt: Callable[..., None]) -> None:
    whole, run = (distilled(finetune__lora__dropout=0.3) for _ in range(2))
    whole.stage("finetune")
    interrupt(run, "finetune")
    torch.rand(7)  # whatever else drew random numbers in between
    run.stage("finetune")
    run.assert_same_tensors(whole, ADAPTER, MAPS)


def test_a_diverging_run_stops_and_keeps_what_was_good(
    distilled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hedgehog.pipeline import summary_loss

    run = distilled()
    forward = summary_loss.SummaryLoss.forward
    calls = []

    def poisoned(self: Any, batch: Any) -> torch.Tensor:
        calls.append(self.training)
        return forward(self, batch) * (torch.inf if sum(calls) > 4 else 1.0)

    monkeypatch.setattr(summary_loss.SummaryLoss, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is inf.*step-000002"):
        run.stage("finetune")
    assert [folder.name for folder in (run.root / "finetune/checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_gradient_that_is_not_finite_names_its_weight(
    stage: int, distilled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hedgehog.pipeline import summary_loss

    create = summary_loss.SummaryLoss.__init__
    part = ("layers.1.self_attn.k_proj.lora_B.default.weight", "layers.1.self_attn.feature_map_q.weight")[stage == 2]

    def poisoned(self: Any, *inputs: Any, **options: Any) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient[-1] = torch.nan
            return gradient

        create(self, *inputs, **options)
        (weight,) = (p for name, p in self.named_parameters() if name.endswith(part))
        weight.register_hook(spoil)

    monkeypatch.setattr(summary_loss.SummaryLoss, "__init__", poisoned)
    with pytest.raises(NonFiniteLossError) as error:
        distilled(engine__zero_stage=stage).stage("finetune")
    assert "step 1: the gradient of " in str(error.value)
    assert f"{part}{', head 3' if stage == 2 else ''}." in str(error.value)


def test_a_loss_that_is_not_finite_names_the_module(
    distilled: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward, calls = LlamaMLP.forward, []

    def poisoned(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return forward(self, x) * (torch.nan if len(calls) % 3 == 2 else 1)  # layer 1 of 3

    monkeypatch.setattr(LlamaMLP, "forward", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan, first of all the output of \S*layers\.1\.mlp\."):
        distilled().stage("finetune")


def test_zero_shot_is_skipped(distilled: Callable[..., Run]) -> None:
    manifest = distilled(finetune__enabled=False).stage("finetune")
    assert manifest.skipped
    assert not manifest.artifacts


def test_a_target_module_that_does_not_exist(distilled: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        distilled(finetune__lora__target_modules=["q_proj", "qq_proj"]).stage("finetune")


def test_adapter_config_says_what_was_asked(finished: Run) -> None:
    settings = json.loads((finished.root / "finetune/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 8, "LORA")
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
