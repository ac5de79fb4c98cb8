"""Who am I: from torchrun's variables, or alone."""

from __future__ import annotations

import os

import pytest
import torch

from hedgehog.pipeline.config import EngineConfig
from hedgehog.pipeline.distributed import (
    TIMEOUT_VARIABLE,
    World,
    discover_world,
    first_host,
    free_port,
    slurm_variables,
)
from hedgehog.pipeline.errors import ConfigError, ResourceError

CPU = EngineConfig(device="cpu")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", TIMEOUT_VARIABLE)
    for name in mine:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_without_a_launcher_there_is_one_process() -> None:
    world = discover_world(CPU)
    assert (world.rank, world.world_size, world.device.type, world.is_main) == (0, 1, "cpu", True)
    assert world.broadcast({"a": 1}) == {"a": 1}
    assert world.gather(3) == [3]
    world.barrier()


def test_torchrun_s_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    world = discover_world(CPU)
    assert (world.rank, world.world_size, world.local_rank, world.is_main) == (3, 4, 1, False)


def test_bfloat16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", (7, 5)),
        ("get_device_name", "Tesla T4"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(ConfigError, match=r"Tesla T4 \(compute capability 7\.5\).*Set engine\.precision=float32"):
        discover_world(EngineConfig(precision="bfloat16"))
    assert discover_world(EngineConfig(precision="float32")).device.type == "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert discover_world(EngineConfig(precision="bfloat16")).device == chosen[-1]


def test_several_processes_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        discover_world(CPU)


def test_a_slurm_step_is_a_world(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        "SLURM_JOB_ID": "812", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "gpu-[07-08]", "SLURM_STEP_TASKS_PER_NODE": "2,1",
    }  # fmt: skip
    found = slurm_variables(step)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("2", "3", "0", "2")
    assert found["MASTER_ADDR"] == "gpu-07" and 1024 < int(found["MASTER_PORT"]) < 32768
    assert slurm_variables({**step, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != found["MASTER_PORT"]
    assert slurm_variables({**step, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"
    batch_script = {name: value for name, value in step.items() if "STEP" not in name}
    assert slurm_variables(batch_script) == slurm_variables({**step, "SLURM_STEP_NUM_TASKS": "1"}) == {}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    for name in found:  # what discover_world adds is taken back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world = discover_world(CPU)
    assert (world.rank, world.world_size, world.local_rank) == (2, 3, 0)


def test_a_first_node_in_no_dns_is_found_where_srun_was_started() -> None:
    step = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gone.invalid,n2",
        "SLURM_JOB_NODELIST": "gone.invalid,n2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
    }  # fmt: skip
    assert slurm_variables(step)["MASTER_ADDR"] == "10.0.0.9"
    assert slurm_variables({**step, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"
    later_nodes = {**step, "SLURM_JOB_NODELIST": "n0,gone.invalid,n2"}
    assert slurm_variables(later_nodes)["MASTER_ADDR"] == "gone.invalid", "srun was started on another node than rank 0"
    known = dict.fromkeys(("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "localhost,n2")
    assert slurm_variables({**step, **known})["MASTER_ADDR"] == "localhost"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu-[03-05,9],login", "gpu-03"),
        ("r[1,3]n[4-5],x", "r1n4"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_variable_that_is_no_number_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'two'"):
        discover_world(CPU)


def test_cuda_is_refused_where_there_is_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ResourceError, match=r"engine\.device.* on \S+; set"):
        discover_world(EngineConfig(device="cuda"))
    assert discover_world(EngineConfig()).device.type == "cpu"


@pytest.mark.parametrize(("num_visible", "device"), [(4, 3), (1, 0), (2, 1)])
def test_a_task_takes_one_of_the_gpus_that_it_sees(
    num_visible: int, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the node's, or only its own where Slurm binds them."""
    import deepspeed  # before it can take this for a machine with GPUs

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name, value in {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    world = discover_world(EngineConfig())
    assert world.device == chosen[0] == torch.device("cuda", device)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    told = []
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: told.append(os.environ["LOCAL_RANK"]))
    world.ensure_process_group()
    assert told == [str(device)], "DeepSpeed takes LOCAL_RANK for the device"


def test_a_rank_that_does_not_come_is_given_up_sooner_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    assert discover_world(CPU, trains=True).timeout_minutes < discover_world(CPU).timeout_minutes
    monkeypatch.setenv(TIMEOUT_VARIABLE, "7")
    assert discover_world(CPU, trains=True).timeout_minutes == discover_world(CPU).timeout_minutes == 7
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0")
    with pytest.raises(ConfigError, match=TIMEOUT_VARIABLE):
        discover_world(CPU)


def test_threads_follow_the_config_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    discover_world(EngineConfig(device="cpu", cpu_threads=3))
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    discover_world(CPU)
    assert torch.get_num_threads() == 3  # left as it is: whoever set the variable decides
    discover_world(EngineConfig(device="cpu", cpu_threads=1))
    assert torch.get_num_threads() == 1


def test_the_main_process_is_rank_zero() -> None:
    assert not World(rank=1, world_size=2, local_rank=1, device=torch.device("cpu")).is_main


def test_a_free_port_can_be_bound() -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port()))
