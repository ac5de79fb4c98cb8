"""What `make cuda` says of kernels that take too much; and on real nvcc, for the smallest of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from hedgehog.kernels.cuda import compile_check
from hedgehog.kernels.cuda.build import HOPPER_UNITS, UNITS, find_nvcc
from hedgehog.kernels.cuda.compile_check import KERNELS, Usage, compile_for, declared_resources, faults, read_usage

INSTANCES = {"forward_hopper.cu": 2, "backward_queries.cu": 9, "backward_keys.cu": 9, "backward_inputs.cu": 1}
INSTANCES |= {"backward_queries_hopper.cu": 1, "backward_keys_hopper.cu": 1}
NAME = "_ZN8hedgehog24linear_attention_forwardILi128ELi256ELb1EEEvNS_17ForwardParametersE"
OUTPUT = f"""ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    616 bytes stack frame, 600 bytes spill stores, 900 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 616 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compiling entry function '_ZN8hedgehog14segment_prefixENS_16PrefixParametersE' for 'sm_90'
ptxas info    : Function properties for _ZN8hedgehog14segment_prefixENS_16PrefixParametersE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers
"""


@pytest.fixture(autouse=True)
def emulation():
    """Not needed here, nor is g++."""


def test_reads_what_the_compiler_says():
    kernel, prefix = read_usage(OUTPUT)
    assert kernel == Usage("linear_attention_forward<128,256,fused>", "sm_90", 255, 16, 1500, 616)
    assert prefix == Usage("segment_prefix", "sm_90", 24, 0, 0, 0)


def test_names_each_fault():
    kernel, prefix = read_usage(OUTPUT)
    assert faults(prefix, {}) == []
    found = " ".join(faults(kernel, {kernel.kernel: (200, 1000)}))
    assert "spills 1500 bytes" in found and "255 registers, declared 200" in found and "16 bytes of shared" in found
    assert "no RESOURCES line declares it" in faults(kernel, {})[0]
    assert faults(replace(prefix, stack_bytes=64), {}) == ["segment_prefix on sm_90: 64 bytes of stack"]


def test_every_kernel_is_declared():
    assert set(KERNELS) | {"backward.cu"} == {*UNITS, *HOPPER_UNITS}  # which only launches
    for unit in KERNELS:
        assert len(declared_resources(unit)) == INSTANCES.get(unit, 8)


@pytest.mark.timeout(1800)
def test_a_kernel_compiles_within_its_resources():
    """One source for one architecture; `make cuda` does all of them for all."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    usages = compile_for(nvcc, "decode.cu", "sm_90")
    declared = declared_resources("decode.cu")
    assert {usage.kernel for usage in usages} == set(declared)
    assert [fault for usage in usages for fault in faults(usage, declared)] == []


def test_wgmma_that_the_compiler_serialised_is_a_fault(monkeypatch):
    warning = "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    done = SimpleNamespace(returncode=0, stderr=f"{warning}\n{OUTPUT}")
    monkeypatch.setattr(compile_check.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RuntimeError, match=r"forward_hopper\.cu for sm_90a: .*C7514"):
        compile_for("nvcc", "forward_hopper.cu", "sm_90a")


def test_main_fails_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(compile_check, "find_nvcc", lambda: None)
    assert compile_check.main() == 1
    assert "nvcc was not found" in capsys.readouterr().err
