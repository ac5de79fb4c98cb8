"""One small face over DeepSpeed: forward, backward, step, and a state that fits any ZeRO stage and world size.

What DeepSpeed does here: gradient reduction, accumulation, sharding of optimizer states (ZeRO-1), gradients (2) and
weights (3), clipping, offload. What it does not: learning rates (`schedule.py`) and checkpoints (`checkpoints.py`).
Its own checkpoints fit one ZeRO stage and one world size only; ours are whole fp32 tensors by name, gathered when
saved and cut again when loaded.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .deepspeed_import import import_deepspeed
from .deepspeed_settings import deepspeed_settings, frozen_settings
from .engine_state import gather_state, rank_file, restore_optimizer, restore_weights
from .errors import ConfigError

if TYPE_CHECKING:
    from .config import EngineConfig
    from .distributed import World

ADAM_BETA1 = 0.9
ADAM_EPS = 1e-8


class TrainingEngine:
    """A module under DeepSpeed. Made by `build_engine`.

    A step is: for every micro-batch `backward(engine(batch))`, then `step(factor)`. The loss given to `backward` is
    this micro-batch's share of the global batch's loss: gradients are summed over micro-batches and ranks, never
    averaged, so that a step does not depend on how its global batch was split.
    """

    def __init__(self, deepspeed_engine: Any, module: nn.Module, optimizer_name: str, world: World) -> None:
        self._engine = deepspeed_engine
        self._optimizer_name = optimizer_name
        self._world = world
        self.module = module
        """The bare module: for evaluation, under torch.no_grad()."""
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        """What learns, by name. Under ZeRO-3 the tensors themselves may be empty; see `full_weights`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's share of the loss."""
        # DeepSpeed averages over ranks and (unless told otherwise) over micro-batches: undo the one, decline the other.
        self._engine.backward(loss * self._world.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; updates nothing

    def step(self, learning_rate_factor: float) -> float:
        """Update the weights after the last micro-batch, with every group's peak learning rate times the factor.

        Returns the gradient's norm before clipping. Where it is not finite no weight was changed.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] * learning_rate_factor
        norm = None
        if not self._engine.zero_optimization():
            # without ZeRO nothing looks at the norm before the update
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
            if not torch.isfinite(torch.tensor(norm)):
                return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Whole fp32 tensors of what learns, by name, on the CPU of rank 0 (others get an empty dict). Collective."""
        weights, _ = gather_state(self._engine, self.parameters, "none", self._world)
        return weights

    def checkpoint_files(self) -> dict[str, dict[str, torch.Tensor]]:
        """What this rank has to write for a checkpoint: safetensors by file name. Collective; after a step."""
        weights, moments = gather_state(self._engine, self.parameters, self._optimizer_name, self._world)
        files = {"weights.safetensors": weights} if self._world.is_main else {}
        if moments:
            name = "optimizer.safetensors" if self._optimizer_name == "adamw" else rank_file(self._world.rank)
            files[name] = moments
        return files

    def layout(self) -> dict[str, Any]:
        """What a checkpoint must remember about this engine to know where it fits."""
        return {
            "optimizer": self._optimizer_name,
            "zero_stage": int(self._engine.zero_optimization_stage()),
            "world_size": self._world.world_size,
        }

    def close(self) -> None:
        """Give back the memory: several engines may follow one another in a process."""
        self._engine.destroy()
        del self._engine
        release_deepspeed()


def build_engine(
    module: nn.Module,
    param_groups: Iterable[Mapping[str, Any]],
    *,
    config: EngineConfig,
    world: World,
    micro_batch_size: int,
    num_accumulation: int,
    gradient_clip: float | None,
    adam_beta2: float,
    weight_decay: float,
    optimizer: str = "adamw",
    keep_weights_whole: bool = False,
    resume_from: Path | None = None,
    resume_layout: Mapping[str, Any] | None = None,
    step: int = 0,
) -> TrainingEngine:
    """Wrap `module`, of which only fp32 parameters learn.

    Args:
        param_groups: dicts with `params` and `peak_learning_rate`. A group is updated independently of the others, to
            the bit: ZeRO flattens each by itself.
        gradient_clip: largest norm over all that learns; None: no clipping.
        optimizer: `adamw` (torch's, on the CPU with `engine.offload_optimizer`) or `adamw8bit`.
        keep_weights_whole: under ZeRO-3, do not shard this module's weights.
        resume_from, resume_layout, step: a checkpoint's folder, its `layout()` and its number of steps.

    Raises:
        ConfigError: settings that exclude each other or that DeepSpeed refuses.
        CheckpointError: the checkpoint does not fit this module or engine.
    """
    if config.offload_optimizer and config.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3.")
    if config.offload_optimizer and optimizer != "adamw":
        raise ConfigError("engine.offload_optimizer works with finetune.optimizer=adamw only: switch one of them off.")
    deepspeed = _start_deepspeed(world)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32]
    assert not wrong, f"only fp32 parameters may learn, not {wrong[:3]}"
    if resume_from is not None:
        restore_weights(trainable, resume_from)

    sizes = [getattr(p, "ds_numel", p.numel()) for p in trainable.values()]
    settings = deepspeed_settings(
        config,
        micro_batch_size=micro_batch_size,
        num_accumulation=num_accumulation,
        gradient_clip=gradient_clip,
        num_trainable=sum(sizes),
        largest_parameter=max(sizes),
        keep_weights_whole=keep_weights_whole,
    )
    groups = [{**group, "lr": group["peak_learning_rate"]} for group in param_groups]
    module.to(world.device)
    options = {"betas": (ADAM_BETA1, adam_beta2), "eps": ADAM_EPS, "weight_decay": weight_decay}
    client = _make_optimizer(optimizer, groups, options)
    deepspeed_engine, *_ = _initialize(deepspeed, config, model=module, optimizer=client, config=settings)
    engine = TrainingEngine(deepspeed_engine, module, optimizer, world)
    if keep_weights_whole and config.zero_stage == 3:
        # DeepSpeed gathers kept weights at a submodule's first call; ours are also read without calling the submodule
        kept = deepspeed_engine.optimizer.persistent_parameters
        kept[0].all_gather(kept)
    if resume_from is not None:
        file = resume_from / ("optimizer.safetensors" if optimizer == "adamw" else rank_file(world.rank))
        restore_optimizer(deepspeed_engine, engine.parameters, file, step, engine.layout(), dict(resume_layout or {}))
    return engine


def shard_frozen(module: nn.Module, layers: nn.ModuleList, *, config: EngineConfig, world: World) -> nn.Module:
    """Put a frozen module under ZeRO-3: every weight is sharded over the ranks and gathered when its module is called.

    Call it for the forward pass like the module itself. `layers` are those of its submodules that follow one another;
    their size bounds what is gathered at once.

    Raises:
        ConfigError: `engine.deepspeed_config` is unreadable, or DeepSpeed refuses it.
    """
    deepspeed = _start_deepspeed(world)
    sizes = [[getattr(p, "ds_numel", p.numel()) for p in layer.parameters()] for layer in layers]
    norms = [getattr(p, "ds_numel", p.numel()) for p in module.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    settings = frozen_settings(config, layer_size=max(map(sum, sizes)), keep_size=max(norms, default=0))
    engine, *_ = _initialize(deepspeed, config, model=module, config=settings)
    engine.eval()
    return engine


def release_deepspeed() -> None:
    """Undo what ZeRO-3 leaves behind in the process: references to every root module, and its own F.linear."""
    if "deepspeed" not in sys.modules:  # the stage did not come that far
        return
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    parameter_offload.FWD_MODULE_STACK.clear()
    original = getattr(partition_parameters.InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        nn.functional.linear = original


@contextmanager
def sharded_loading(config: EngineConfig, world: World) -> Iterator[None]:
    """Inside, `from_pretrained` builds models sharded from the start under ZeRO-3; no change under ZeRO 0 to 2."""
    if config.zero_stage != 3:
        yield
        return
    _start_deepspeed(world)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps a weak reference only. bf16 here is the type in which weights are made, nothing more.
    sharding = HfDeepSpeedConfig(
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": config.precision == "bfloat16"},
        }
    )
    try:
        yield
    finally:
        del sharding
        unset_hf_deepspeed_config()


def _start_deepspeed(world: World) -> ModuleType:
    deepspeed = import_deepspeed(world.device)
    # DeepSpeed calls collectives whose names torch is about to change, and would be told so at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    world.ensure_process_group()
    return deepspeed


def _initialize(deepspeed: ModuleType, engine_config: EngineConfig, **arguments: Any) -> tuple[Any, ...]:
    try:
        return deepspeed.initialize(dist_init_required=False, **arguments)
    except (ValueError, AssertionError) as error:  # pydantic's ValidationError is a ValueError
        file = engine_config.deepspeed_config
        if file is None:
            raise
        raise ConfigError(f"engine.deepspeed_config: DeepSpeed refuses {file}: {error}") from error


def _make_optimizer(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """Offloaded states use torch's AdamW too. DeepSpeed's CPU version is for billions of weights that learn; here are
    some millions, and it would have to be compiled at its first use.
    """
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)  # pyright: ignore[reportPrivateImportUsage]
    return torch.optim.AdamW(groups, **options)
