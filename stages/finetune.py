"""Stage two: LoRA on the summaries, loss on the summaries' tokens only. Feature maps learn along, or stay.

load the base → linear attention with the distilled maps (or softmax) → adapters → train → adapter and maps

An encoder learns to tell the rows' labels; its head learns along, whole.
"""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..pipeline.checkpoints import Checkpoints
from ..pipeline.classification_head import head_modules, new_head, release_head, save_head
from ..pipeline.data.batches import NO_LOSS, BatchPlan, LossOn, validation_batches
from ..pipeline.data.tokens import TokenizedSplit
from ..pipeline.engine import TrainingEngine, build_engine, sharded_loading
from ..pipeline.errors import ConfigError
from ..pipeline.families import family_of_config
from ..pipeline.feature_map_file import read_feature_maps, write_feature_maps
from ..pipeline.label_loss import LabelLoss
from ..pipeline.lora import attach_lora, save_adapter
from ..pipeline.modeling.convert import convert_base, feature_map_modules, load_hedgehog
from ..pipeline.modeling.load_base import load_prepared_base
from ..pipeline.run_folder import atomic_file
from ..pipeline.stage_context import StageContext, StageResult
from ..pipeline.summary_loss import SummaryLoss
from ..pipeline.training import sum_over_ranks, to_device, train

if TYPE_CHECKING:
    from ..pipeline.modeling.hedgehog_model import HedgehogPreTrainedModel

CONSUMES = ("prepare", "distill")
SECTIONS = ("model", "finetune", "data.max_length_tokens", "engine.precision", "seed")
IGNORED = frozenset(
    {
        "model.trust_remote_code",
        "model.attention_backend",
        "model.chunk_size",
        "finetune.gradient_checkpointing",
        "finetune.log_every_steps",
        "finetune.save_every_steps",
        "finetune.eval_every_steps",
    }
)

ADAPTER = "adapter"
FEATURE_MAPS = "feature_maps.safetensors"
HEAD = "head.safetensors"
PAD_ID = 0
"""Right padding is never attended to and has no label, so any id would do."""
_CURE = "Lower finetune.learning_rate, or set a smaller finetune.gradient_clip, then begin the stage anew with --force."


def run(ctx: StageContext) -> StageResult:
    """Train the adapter, and the feature maps along with it where the config says so.

    Raises:
        ModelError, ConfigError, CheckpointError, ResourceError, NonFiniteLossError.
    """
    config = ctx.config
    if not config.finetune.enabled:
        return StageResult(skipped="finetune.enabled is false: the model is scored as distill left it")
    model = _load(ctx)
    model.report_to(ctx.reporter.info)
    adapted = attach_lora(model, config.finetune.lora, seed=ctx.rng("finetune.lora").initial_seed())
    map_parameters = _release_feature_maps(ctx, model)
    if config.finetune.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.23 renamed it, 5.17 has only this name
            model.gradient_checkpointing_enable({"use_reentrant": False})
    is_encoder = family_of_config(model.config).is_encoder
    release_head(model)
    module = LabelLoss(adapted) if is_encoder else SummaryLoss(adapted, packed=config.finetune.packing)

    plan = BatchPlan(
        TokenizedSplit.open(ctx.inputs["prepare"].artifact("tokens_train")),
        config.finetune,
        config.data.max_length_tokens,
        PAD_ID,
        config.seed,
        ctx.world,
        loss_on="row" if is_encoder else "summary",
    )
    checkpoints = Checkpoints(
        ctx.folder / "checkpoints",
        ctx.fingerprint,
        ctx.world,
        best_metric=_validation_figure(ctx),
        warn=ctx.reporter.warning,
    )
    resumed = checkpoints.newest()
    engine = build_engine(
        module,
        _parameter_groups(ctx, module, map_parameters),
        config=config.engine,
        world=ctx.world,
        micro_batch_size=config.finetune.micro_batch_size,
        num_accumulation=plan.num_accumulation,
        gradient_clip=config.finetune.gradient_clip,
        adam_beta2=config.finetune.adam_beta2,
        weight_decay=config.finetune.weight_decay,
        optimizer=config.finetune.optimizer,
        resume_from=resumed.folder if resumed else None,
        resume_layout=resumed.layout if resumed else None,
        step=resumed.step if resumed else 0,
    )
    num_trained = sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters.values())
    ctx.reporter.info(f"{num_trained:,} weights learn, {plan.num_steps} steps")
    outcome = train(
        _Finetuning(ctx, engine, plan.loss_on),
        engine,
        plan,
        config.finetune,
        checkpoints,
        resumed=resumed,
        seed=config.seed,
        world=ctx.world,
        reporter=ctx.reporter,
        cure=_CURE,
    )
    validation_loss = outcome.validation[_validation_figure(ctx)]
    units = {"classification": "nats a row", "regression": "squared error a row"}
    unit = units.get(config.data.kind, "nats a token")
    ctx.reporter.info(f"loss on the validation rows: {validation_loss:.4f} {unit}")
    artifacts = _save(ctx, engine, module, model)
    engine.close()
    del engine, module, adapted, model
    gc.collect()  # the model's hooks hold it in a cycle, and the next stage loads another
    return StageResult(
        artifacts=artifacts,
        summary={
            "validation_loss": validation_loss,
            "validation_figure": _validation_figure(ctx),
            "best_step": outcome.best_step,
            "steps": outcome.num_steps,
            "tokens": outcome.num_tokens,
            "trained_weights": num_trained,
        },
    )


def _validation_figure(ctx: StageContext) -> str:
    """What the loss on the validation rows is called in metrics and checkpoints."""
    return "validation_loss_mse" if ctx.config.data.kind == "regression" else "validation_loss_nats"


class _Finetuning:
    """Finetuning as the training loop sees it."""

    def __init__(self, ctx: StageContext, engine: TrainingEngine, loss_on: LossOn) -> None:
        self.figure = _validation_figure(ctx)
        self._ctx = ctx
        self._engine = engine
        self._loss_on: LossOn = loss_on
        self._validation = TokenizedSplit.open(ctx.inputs["prepare"].artifact("tokens_validation"))

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        share = self._engine(batch) / batch["tokens_in_global_batch"]
        return share, {"loss": share}

    def figures(self, totals: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {self.figure.removeprefix("validation_"): float(totals["loss"])}

    def fault(self, totals: Mapping[str, torch.Tensor], first_fault: Callable[[], str | None]) -> str:
        first = first_fault()
        return f"the loss is {float(totals['loss'])}" + (f", first of all {first}" if first else "")

    def validate(self) -> dict[str, float]:
        """Nats per summary token over the validation rows; of labelled rows, nats or squared error a row."""
        world, settings = self._ctx.world, self._ctx.config.finetune
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        rows = validation_batches(self._validation, settings.micro_batch_size, PAD_ID, world, loss_on=self._loss_on)
        for batch in rows:
            batch = to_device(batch, world.device)
            loss = self._engine.module(batch)
            if batch["counted"]:
                count = len(batch["row_labels"]) if self._loss_on == "row" else (batch["labels"] != NO_LOSS).sum()
                sums += torch.stack([loss.double(), torch.as_tensor(count, device=world.device).double()])
        loss, count = sum_over_ranks({"sums": sums}, world)["sums"].tolist()
        return {self.figure: loss / count}


def _load(ctx: StageContext) -> HedgehogPreTrainedModel:
    """The converted model with its distilled maps; for softmax attention the same class without maps."""
    config = ctx.config
    sharded = config.engine.zero_stage == 3
    if sharded and config.model.quantization is not None:
        raise ConfigError("engine.zero_stage 3 cannot shard quantized weights: use stage 2, or no quantization.")
    with sharded_loading(config.engine, ctx.world):
        device = None if sharded else ctx.world.device
        base = load_prepared_base(ctx.inputs["prepare"], config, dtype=config.engine.precision, device=device)
    if new := new_head(base):
        ctx.reporter.info(f"{' and '.join(new)}: not among the base's weights, begin at random")
    if config.model.attention == "softmax":
        return convert_base(base, attention="softmax")
    return load_hedgehog(
        base,
        ctx.inputs["distill"].artifact("feature_maps"),
        attention_eps=config.model.attention_eps,
        chunk_size=config.model.chunk_size,
        attention_backend=config.model.attention_backend,
        feature_map_seed=config.seed,
    )


def _release_feature_maps(ctx: StageContext, model: HedgehogPreTrainedModel) -> list[torch.Tensor]:
    """The feature maps' weights that are to learn, which peft froze with all the rest."""
    if not ctx.config.finetune.train_feature_maps:
        return []
    weights = [p for module in feature_map_modules(model).values() for p in module.parameters()]
    return [weight.requires_grad_() for weight in weights]


def _parameter_groups(ctx: StageContext, module: nn.Module, map_parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
    settings = ctx.config.finetune
    of_maps = {id(p) for p in map_parameters}
    adapters = [p for p in module.parameters() if p.requires_grad and id(p) not in of_maps]
    groups = [{"params": adapters, "peak_learning_rate": settings.learning_rate}]
    if map_parameters:
        rate = settings.feature_map_learning_rate or settings.learning_rate
        groups.append({"params": map_parameters, "peak_learning_rate": rate})
    return groups


def _save(
    ctx: StageContext, engine: TrainingEngine, module: SummaryLoss | LabelLoss, model: HedgehogPreTrainedModel
) -> dict[str, str]:
    """Write the artifacts (rank 0). Collective: the weights are gathered from all ranks."""
    weights = engine.full_weights()
    if not ctx.world.is_main:
        return {}
    prefix = "model."  # the loss holds the model
    save_adapter(
        ctx.folder / ADAPTER,
        module.model,
        {name.removeprefix(prefix): tensor for name, tensor in weights.items()},
    )
    names = {id(parameter): name for name, parameter in engine.parameters.items()}
    artifacts = {"adapter": ADAPTER}
    if head_modules(model):
        save_head(ctx.folder / HEAD, model, {own: weights[name] for own, name in names.items()})
        artifacts["head"] = HEAD
    if ctx.config.model.attention == "softmax":
        return artifacts
    distilled = ctx.inputs["distill"].artifact("feature_maps")
    trained = {
        f"layers.{layer}.{side}.{key}": weights[names[id(parameter)]]
        for (layer, side), feature_map in feature_map_modules(model).items()
        for key, parameter in feature_map.named_parameters()
        if id(parameter) in names
    }
    if trained:
        tensors, metadata = read_feature_maps(distilled)
        write_feature_maps(ctx.folder / FEATURE_MAPS, {**tensors, **trained}, metadata)
    else:
        with atomic_file(ctx.folder / FEATURE_MAPS) as temporary:
            shutil.copyfile(distilled, temporary)
    return {**artifacts, "feature_maps": FEATURE_MAPS}
