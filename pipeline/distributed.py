"""Who am I among the processes: rank, world size, device; from torchrun's, Slurm's or no variables at all."""

from __future__ import annotations

import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import torch

    from .config import EngineConfig


TIMEOUT_VARIABLE = "HEDGEHOG_RANK_TIMEOUT_MINUTES"
"""How long ranks wait for one that does not come before they end with an error, where the defaults do not fit."""
_TRAINING_TIMEOUT_MINUTES = 30
"""Ranks that train meet at every step. The longest way between two meetings is loading the model, or a validation."""
_TIMEOUT_MINUTES = 180
"""Elsewhere rank 0 works alone for long: it counts tokens, or merges and writes an export of hundreds of GB."""


@dataclass(frozen=True)
class World:
    """The processes of this run. `device` is this process's; alone, rank 0 of 1."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_minutes: int = _TIMEOUT_MINUTES

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def ensure_process_group(self) -> None:
        """Start torch.distributed (gloo on a CPU, NCCL on CUDA) for DeepSpeed, once.

        A process alone gets the variables that DeepSpeed insists on and a store in its own memory, so that it needs
        neither a launcher nor a port.
        """
        import torch.distributed as dist

        if dist.is_initialized():
            return
        from .deepspeed_import import import_deepspeed

        deepspeed = import_deepspeed(self.device)

        os.environ.setdefault("RANK", str(self.rank))
        os.environ.setdefault("WORLD_SIZE", str(self.world_size))
        # DeepSpeed takes it for the number of the device
        os.environ["LOCAL_RANK"] = str(self.local_rank if self.device.index is None else self.device.index)
        # torch guesses, rightly, the device that DeepSpeed's barriers are for, and would say so
        warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)
        timeout = timedelta(minutes=self.timeout_minutes)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        if self.world_size == 1:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            import torch.distributed as dist

            self.ensure_process_group()
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        self.ensure_process_group()
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        self.ensure_process_group()
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task of a Slurm step, from Slurm's own; empty outside a step of several tasks.

    The rendezvous is on the step's first node, where rank 0 is, at a port that the job and step ids decide, so that
    jobs that share a node do not meet. A MASTER_ADDR or MASTER_PORT that is set stays.

    Where that node's name is in no DNS, its address is the one that srun was started at: sbatch runs a job's script on
    the first node of the allocation, and a step over all of its nodes begins there. (Not so for an srun that is typed
    into salloc on a login node: there only a name that resolves, or MASTER_ADDR, helps.)

    Raises:
        ConfigError: a variable that should be a number is none.
    """
    # the batch script itself has SLURM_PROCID too, but belongs to no step
    if "SLURM_STEP_ID" not in environment or _integer(environment, "SLURM_STEP_NUM_TASKS", 1) < 2:
        return {}
    num_tasks = _integer(environment, "SLURM_STEP_NUM_TASKS", 1)
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    seed = 31 * _integer(environment, "SLURM_JOB_ID", 0) + _integer(environment, "SLURM_STEP_ID", 0)
    tasks_per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", str(num_tasks))
    return {
        "RANK": str(_integer(environment, "SLURM_PROCID", 0)),
        "LOCAL_RANK": str(_integer(environment, "SLURM_LOCALID", 0)),
        "WORLD_SIZE": str(num_tasks),
        # `4(x2),3`: the most that any node has, by which the cores are shared
        "LOCAL_WORLD_SIZE": str(max(int(n) for n in re.findall(r"(?:^|,)(\d+)", tasks_per_node))),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _address(first_host(nodes), environment),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + seed % 12000),  # below the ephemeral ports
    }


def _address(host: str, environment: Mapping[str, str]) -> str:
    launched_at = environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if not launched_at or first_host(environment.get("SLURM_JOB_NODELIST", "")) != host:
        return host
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return launched_at
    return host


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `gpu-[03-05,9],login` is `gpu-03`."""
    bracketed = r"\[(\w+)[^\]]*\]"
    name = re.match(rf"(?:{bracketed}|[^,\[])*", nodes)
    return re.sub(bracketed, r"\1", name[0]) if name else nodes


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, str(default))
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"the environment's {name} is '{value}', which is no number: unset it.") from None


def _check_precision(engine: EngineConfig, device: torch.device) -> None:
    """
    Raises:
        ConfigError: bfloat16 on a GPU that does not compute in it. torch emulates it there: slowly, and not everywhere.
    """
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if engine.precision == "bfloat16" and torch.version.hip is None and major < 8:
        raise ConfigError(
            f"engine.precision: bfloat16, but {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}) does not have it: it came with 8.0 (A100, RTX 30). Set engine.precision=float32, or "
            "take another GPU."
        )


def discover_world(engine: EngineConfig, *, trains: bool = False) -> World:
    """Read rank and world size, choose this process's device and its number of CPU threads.

    torchrun's RANK, WORLD_SIZE and LOCAL_RANK come first, then those of a Slurm step (`srun`); else one process alone.

    Args:
        trains: the ranks meet at every step, so that one that does not come is given up sooner.

    Raises:
        ConfigError: several processes but no rendezvous address, a variable that is no number, or bfloat16 on a GPU
            without it.
        ResourceError: CUDA asked for and not there.
    """
    import torch

    if "WORLD_SIZE" not in os.environ:
        os.environ.update(slurm_variables(os.environ))
    rank, world_size, local_rank = (
        _integer(os.environ, name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if world_size > 1 and not os.environ.get("MASTER_ADDR"):
        raise ConfigError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set: start the processes with torchrun or srun."
        )
    use_cuda = torch.cuda.is_available() if engine.device == "auto" else engine.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise ResourceError(
            f"engine.device: cuda, but torch finds no CUDA device on {socket.gethostname()}; set engine.device=cpu or "
            "auto."
        )
    if use_cuda:
        # --gpus-per-task and --gpu-bind let every task see its own GPUs only, numbered from 0
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        _check_precision(engine, device)
    else:
        device = torch.device("cpu")
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        threads = engine.cpu_threads or max(1, _num_cores() // local_world_size)
        if engine.cpu_threads or world_size > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads)  # torchrun sets OMP_NUM_THREADS to 1, whatever the number of cores
    default = _TRAINING_TIMEOUT_MINUTES if trains else _TIMEOUT_MINUTES
    timeout_minutes = _integer(os.environ, TIMEOUT_VARIABLE, default)
    if timeout_minutes < 1:
        raise ConfigError(f"the environment's {TIMEOUT_VARIABLE} is '{timeout_minutes}': give minutes, 1 or more.")
    return World(rank, world_size, local_rank, device, timeout_minutes)
