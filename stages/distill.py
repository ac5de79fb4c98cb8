"""Stage one: feature maps learn to reproduce the frozen base's softmax attention, layer by layer.

    load the teacher → initial maps → for each batch: teacher pass, a loss per layer, step → KL on validation → artifact

A subset of the layers (`distill.layers`) trains in a folder of its own, with the same result as all layers at once;
`merge` joins the subsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.softmax_attention import MaterialisedAttentionError
from ..pipeline.checkpoints import Checkpoints
from ..pipeline.data.batches import BatchPlan, validation_batches
from ..pipeline.data.tokens import TokenizedSplit
from ..pipeline.engine import TrainingEngine, build_engine, release_deepspeed, shard_frozen, sharded_loading
from ..pipeline.errors import CheckpointError, ConfigError, ModelError
from ..pipeline.feature_map_file import read_feature_maps, write_feature_maps
from ..pipeline.hidden_state_cache import open_cache, remove_cache
from ..pipeline.manifest import Manifest, StageInput, read_manifest
from ..pipeline.stage_context import StageContext, StageResult
from ..pipeline.training import sum_over_ranks, to_device, train

if TYPE_CHECKING:
    from ..pipeline.distillation import FeatureMapDistillation
    from ..pipeline.modeling.hedgehog_model import HedgehogPreTrainedModel

CONSUMES = ("prepare",)
SECTIONS = ("model", "distill", "data.max_length_tokens", "engine.precision", "seed")
IGNORED = frozenset(
    {
        "model.trust_remote_code",
        "model.attention_backend",
        "model.attention_eps",
        "model.chunk_size",
        "distill.cache_hidden_states",
        "distill.layers",  # layers are independent, and a subset has its own folder
        "distill.log_every_steps",
        "distill.save_every_steps",
        "distill.eval_every_steps",
    }
)

ARTIFACT = "feature_maps.safetensors"
CHECKPOINT_FACTOR = 3
"""A checkpoint's size over that of the fp32 maps: the maps and AdamW's two moments."""
PAD_ID = 0
"""Stands where the mask is False, so any id would do."""
_CURE = (
    "Lower distill.learning_rate, raise distill.loss_eps, or set a smaller distill.gradient_clip, then begin the stage "
    "anew with --force."
)


def run(ctx: StageContext) -> StageResult:
    """Distill the maps of all layers, or of `distill.layers`.

    Raises:
        ModelError, ConfigError, CheckpointError, ResourceError, NonFiniteLossError.
    """
    config = ctx.config
    if config.model.attention == "softmax":
        return StageResult(skipped="model.attention is softmax: there are no feature maps")
    try:
        return _distill(ctx)
    except MaterialisedAttentionError as error:
        raise ConfigError(
            f"distill: {error}. Lower data.max_length_tokens or distill.micro_batch_size, or set the other "
            f"engine.precision (now {config.engine.precision})."
        ) from error
    finally:
        release_deepspeed()


def _distill(ctx: StageContext) -> StageResult:
    config = ctx.config
    module, hedgehog = _load(ctx)
    task = _Distillation(ctx, module)
    reason = None
    if not config.distill.enabled:
        reason = "distill.enabled is false"
    elif not module.learns:
        reason = f"{config.model.feature_map} has no weights"
    if reason:
        ctx.reporter.info(f"{reason}: the maps stay at their start")
        module.to(ctx.world.device)
        with torch.no_grad():
            task.validate()
        return _save(ctx, hedgehog, module, {}, task, {"steps": 0, "tokens": 0, "trained": False})

    plan = BatchPlan(
        TokenizedSplit.open(ctx.inputs["prepare"].artifact("tokens_train")),
        config.distill,
        config.data.max_length_tokens,
        PAD_ID,
        config.seed,
        ctx.world,
        loss_on="all",
    )
    module.hidden_states = open_cache(
        config,
        ctx.folder,
        ctx.inputs["prepare"],
        plan,
        module.layer_indices,
        hedgehog.config.hidden_size,
        CHECKPOINT_FACTOR * sum(weight.nbytes for weight in module.parameters()),
        ctx.world,
        ctx.reporter,
    )
    checkpoints = Checkpoints(
        ctx.folder / "checkpoints",
        ctx.fingerprint,
        ctx.world,
        best_metric=_Distillation.FIGURE,
        warn=ctx.reporter.warning,
    )
    resumed = checkpoints.newest()
    engine = build_engine(
        module,
        module.parameter_groups(config.distill.learning_rate),
        config=config.engine,
        world=ctx.world,
        micro_batch_size=config.distill.micro_batch_size,
        num_accumulation=plan.num_accumulation,
        gradient_clip=None,  # per layer, in the module
        adam_beta2=config.distill.adam_beta2,
        weight_decay=config.distill.weight_decay,
        keep_weights_whole=True,
        resume_from=resumed.folder if resumed else None,
        resume_layout=resumed.layout if resumed else None,
        step=resumed.step if resumed else 0,
    )
    task.start(engine)
    outcome = train(
        task,
        engine,
        plan,
        config.distill,
        checkpoints,
        resumed=resumed,
        seed=config.seed,
        world=ctx.world,
        reporter=ctx.reporter,
        cure=_CURE,
    )
    weights = engine.full_weights()
    result = _save(
        ctx,
        hedgehog,
        module,
        weights,
        task,
        {
            "steps": outcome.num_steps,
            "tokens": outcome.num_tokens,
            "best_step": outcome.best_step,
            "trained": True,
        },
    )
    engine.close()
    _end_cache(ctx, module)
    return result


def _end_cache(ctx: StageContext, module: FeatureMapDistillation) -> None:
    """The artifact is written: nothing is read from the cache any more, this attempt's or an earlier one's."""
    if module.hidden_states is not None:
        module.hidden_states.close()
    if ctx.world.is_main:
        remove_cache(ctx.folder)


def merge(ctx: StageContext) -> StageResult:
    """Join the subsets in `<stage>/layers-*/` into the stage's artifact.

    Raises:
        CheckpointError: a subset is unfinished or of another config, or a layer is missing or there twice.
    """
    if not ctx.world.is_main:
        return StageResult()
    shards = []
    for folder in ctx.run_folder.subsets(ctx.variant):
        manifest = read_manifest(folder)
        if manifest is None or manifest.status != "done":
            raise CheckpointError(
                f"{folder}: this subset is not finished; run "
                f"`hedgehog distill CONFIG distill.layers={folder.name.removeprefix('layers-')}`."
            )
        if manifest.fingerprint != ctx.fingerprint:
            raise CheckpointError(
                f"{folder}: this subset was trained with another config or other inputs; remove it, or train it again "
                "with --force."
            )
        shards.append((folder, manifest))
    if not shards:
        raise CheckpointError(f"{ctx.folder}: there are no subsets (layers-*) to merge.")
    summary = merge_shards(shards, ctx.folder / ARTIFACT)
    ctx.reporter.info(f"merged {len(shards)} subsets; mean KL {summary['kl_mean']:.4f} nats")
    return StageResult(artifacts={"feature_maps": ARTIFACT}, summary=summary)


def merge_shards(shards: list[tuple[Path, Manifest]], target: Path) -> dict[str, Any]:
    """Join finished subsets (folder, manifest) into one file of maps; returns the joint summary.

    Raises:
        CheckpointError: a layer is missing or there twice, or the maps are of different kinds.
    """
    tensors: dict[str, torch.Tensor] = {}
    owners: dict[int, Path] = {}
    kl_per_head: dict[int, list[float]] = {}
    metadata: dict[str, Any] | None = None
    num_layers = 0
    for folder, manifest in shards:
        maps, facts = read_feature_maps(StageInput(folder, manifest).artifact("feature_maps"))
        kind = {key: value for key, value in facts.items() if key != "layers"}
        if metadata is not None and kind != metadata:
            raise CheckpointError(f"{folder}: its maps are of another kind than those of {shards[0][0]}.")
        metadata, num_layers = kind, facts["num_layers"]
        for layer, kl_H in zip(facts["layers"], manifest.summary["kl_per_head"], strict=True):
            if layer in owners:
                raise CheckpointError(
                    f"layer {layer} is in {owners[layer].name} and in {folder.name}; remove one of them."
                )
            owners[layer] = folder
            kl_per_head[layer] = kl_H
        tensors |= maps
    missing = sorted(set(range(num_layers)) - owners.keys())
    if missing:
        raise CheckpointError(
            f"layers {', '.join(map(str, missing))} are missing: train them with distill.layers=…, then merge again."
        )
    write_feature_maps(target, tensors, {**(metadata or {}), "layers": sorted(owners)})
    summary = _kl_summary(torch.tensor([kl_per_head[layer] for layer in sorted(owners)], dtype=torch.float64))
    steps = [manifest.summary.get("steps", 0) for _, manifest in shards]
    tokens = [manifest.summary.get("tokens", 0) for _, manifest in shards]
    return {
        **summary,
        "steps": max(steps),
        "tokens": max(tokens),
        "merged_from": [folder.name for folder, _ in shards],
        "parts_duration_s": sum(manifest.duration_s for _, manifest in shards),
        "parts_peak_memory_bytes": max(manifest.peak_memory_bytes for _, manifest in shards),
    }


class _Distillation:
    """Distillation as the training loop sees it."""

    FIGURE = "validation_kl_nats"

    def __init__(self, ctx: StageContext, module: FeatureMapDistillation) -> None:
        self._ctx = ctx
        self._module = module
        self._engine: TrainingEngine | None = None
        self._validation = TokenizedSplit.open(ctx.inputs["prepare"].artifact("tokens_validation"))
        self.kl_LH = torch.empty(0)
        """KL per layer and head at the last validation, fp64 on the CPU."""

    def start(self, engine: TrainingEngine) -> None:
        self._engine = engine
        if self._ctx.config.distill.output_mse_weight > 0:
            one = validation_batches(self._validation, 8, PAD_ID, _ALONE, loss_on="all")[0]
            self._module.measure_output_variance(to_device(one, self._ctx.world.device))

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self._engine is not None
        return self._engine(batch)

    def figures(self, totals: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {
            "loss_nats": float(totals["loss_L"].mean()),
            "kl_nats": float(totals["kl_LH"].mean()),
            "layer_grad_norm_max": float(totals["grad_norm_L"].max()),
        }

    def fault(self, totals: Mapping[str, torch.Tensor], first_fault: Callable[[], str | None]) -> str:
        """
        Raises:
            ModelError: it is the base model's.
        """
        weight = self._module.base_fault()
        if weight is not None:
            base = self._ctx.inputs["prepare"].summary["base_model"]
            raise ModelError(f"{base}: {weight} holds NaN or infinity: nothing can be learned from it; fetch it again")
        for name, what in (("kl_LH", "loss"), ("grad_norm_LH", "gradient")):
            bad = (~torch.isfinite(totals[name])).nonzero()
            if len(bad):
                row, head = bad[0].tolist()
                return f"the {what} of layer {self._module.layer_indices[row]}, head {head}"
        bad = (~torch.isfinite(totals["loss_L"] + totals["grad_norm_L"])).nonzero()
        if len(bad):
            return f"the loss of layer {self._module.layer_indices[int(bad[0])]}"
        raise AssertionError("all figures are finite")

    def validate(self) -> dict[str, float]:
        device = self._ctx.world.device
        batches = validation_batches(
            self._validation, self._ctx.config.distill.micro_batch_size, PAD_ID, self._ctx.world, loss_on="all"
        )
        totals = sum_over_ranks(self._module.measure(to_device(batch, device) for batch in batches), self._ctx.world)
        self.kl_LH = totals["kl_LH"] / totals["tokens"]
        return {self.FIGURE: float(self.kl_LH.mean())}


class _Alone:
    """All rows on every rank."""

    rank = 0
    world_size = 1


_ALONE = _Alone()


def _load(ctx: StageContext) -> tuple[FeatureMapDistillation, HedgehogPreTrainedModel]:
    # Importing transformers' models takes seconds, which `merge` need not wait.
    from ..pipeline.distillation import FeatureMapDistillation, Teacher
    from ..pipeline.layer_subset import parse_layers
    from ..pipeline.modeling.architecture import architecture_of
    from ..pipeline.modeling.convert import convert_base
    from ..pipeline.modeling.load_base import load_prepared_base

    config, prepare = ctx.config, ctx.inputs["prepare"]
    sharded = config.engine.zero_stage == 3
    if sharded and config.model.quantization is not None:
        raise ConfigError("engine.zero_stage 3 cannot shard quantized weights: use stage 2, or no quantization.")
    with sharded_loading(config.engine, ctx.world):
        device = None if sharded else ctx.world.device
        base = load_prepared_base(prepare, config, dtype=config.engine.precision, device=device)
    layers = parse_layers(config.distill.layers, base.config.num_hidden_layers)
    hedgehog = convert_base(
        base,
        attention="linear",
        feature_map=config.model.feature_map,
        feature_dim=config.model.feature_dim,
        feature_map_options=config.model.feature_map_options,
        feature_map_seed=config.seed,
        attention_eps=config.model.attention_eps,
        chunk_size=config.model.chunk_size,
    )
    teacher = Teacher(base, layers)
    callable_teacher = teacher
    if sharded:
        base_layers = architecture_of(base).layers(base)
        callable_teacher = shard_frozen(teacher, base_layers, config=config.engine, world=ctx.world)
    module = FeatureMapDistillation(
        hedgehog,
        callable_teacher,
        layers,
        config.distill,
        backend=config.model.attention_backend,
        report=ctx.reporter.info,
    )
    return module, hedgehog


def _save(
    ctx: StageContext,
    hedgehog: HedgehogPreTrainedModel,
    module: FeatureMapDistillation,
    weights: dict[str, torch.Tensor],
    task: _Distillation,
    facts: dict[str, Any],
) -> StageResult:
    """Write the maps (rank 0) and report the KL."""
    from ..pipeline.modeling.convert import feature_map_metadata

    if not ctx.world.is_main:
        return StageResult()
    tensors = {**module.state_dict(), **weights}
    metadata = {
        **feature_map_metadata(hedgehog.config),
        "num_layers": hedgehog.config.num_hidden_layers,
        "layers": list(module.layer_indices),
    }
    write_feature_maps(ctx.folder / ARTIFACT, tensors, metadata)
    summary = _kl_summary(task.kl_LH)
    rows = [
        (f"layer {layer}", f"{kl_H.mean():.4f}", f"{kl_H.min():.4f}", f"{kl_H.max():.4f}")
        for layer, kl_H in zip(module.layer_indices, task.kl_LH, strict=True)
    ]
    ctx.reporter.table(
        f"KL to softmax attention on validation, nats (mean {summary['kl_mean']:.4f})",
        ("", "mean", "best head", "worst head"),
        rows,
    )
    return StageResult(
        artifacts={"feature_maps": ARTIFACT}, summary={**summary, "layers": list(module.layer_indices), **facts}
    )


def _kl_summary(kl_LH: torch.Tensor) -> dict[str, Any]:
    return {
        "kl_mean": float(kl_LH.mean()),
        "kl_per_layer": kl_LH.mean(dim=1).tolist(),
        "kl_per_head": kl_LH.tolist(),
    }
