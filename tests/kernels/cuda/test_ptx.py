"""What nvcc makes of the kernels gives what the emulation gives: its PTX, inline assembly included, is run on this CPU.

The emulation replaces inline assembly by functions of its own; a wrong operand there would show only on a GPU.
tests/kernels/ptx has the machine that runs it, written from the manual. Runs in `make compiles` and `make cuda`.
"""

from __future__ import annotations

import gc
import re
import zlib
from dataclasses import replace

import pytest
import torch

from hedgehog.kernels.cuda.backward_choice import SWITCH as BACKWARD_SWITCH
from hedgehog.kernels.cuda.build import find_nvcc
from hedgehog.kernels.cuda.compile_check import readable_name
from hedgehog.kernels.cuda.forward_choice import SWITCH as FORWARD_SWITCH
from hedgehog.kernels.cuda.operators import linear_attention_token
from hedgehog.kernels.linear_attention import LinearAttentionState

from ..ptx.memory import Fault
from ..ptx.program import read_programs
from .problems import EPS, Problem, random_problem
from .ptx_twin import PTX, Twin, edited, machine_of, ptx_of_all, twin_of

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc, for its PTX"),
]

MOST = 1e-3
"""Relative; the same sums in another order, exponentials to the last bit or not, then one rounding to bf16."""
SHAPES = [(64, 128), (64, 256), (128, 128), (128, 256)]
SIMPLE = ["hedgehog_softmax", "given"]


@pytest.fixture(scope="module", autouse=True)
def ptx(everyones_folder, made_once):
    """nvcc takes some twenty seconds for all sources, and every worker of xdist needs nearly all of them."""
    PTX.update(made_once(everyones_folder / "ptx.json", ptx_of_all))


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN: memory that a kernel leaves alone shows, and so does what it writes."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def programs_are_no_garbage():
    """They stay until the session ends. Looked through for garbage again and again they took a sixth of these tests.
    Frozen in between alone: the twin looks for a test's tensors among what is not."""
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


def kind_of(feature_map: str) -> str:
    return "given" if feature_map == "given" else "fused"


def run_both(emulation, request, problem: Problem, *, segments: int = 1, backward: bool = False, machine=machine_of):
    """Forward, and with `backward` all gradients, by emulation and PTX."""
    q, k, v = (x.detach().requires_grad_(backward) for x in (problem.q, problem.k, problem.v))
    problem = replace(problem, q=q, k=k, v=v)
    if problem.weight_q is not None and problem.weight_k is not None:
        weights = (w.detach().requires_grad_(backward) for w in (problem.weight_q, problem.weight_k))
        problem = replace(problem, **dict(zip(("weight_q", "weight_k"), weights, strict=True)))
    if backward:
        _pass(problem, segments, backward)  # the kernels are looked at once before they serve: not here
    with twin_of(emulation, machine, seed=zlib.crc32(request.node.name.encode())) as twin:
        _pass(problem, segments, backward)
    return twin


def _pass(problem: Problem, segments: int, backward: bool) -> None:
    out, _, kv_state, k_sum = problem.run(segments=segments)
    if backward:
        generator = torch.Generator().manual_seed(5)
        grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, kv_state, k_sum)]
        torch.autograd.backward((out, kv_state, k_sum), grads)


def names(twin: Twin) -> set[str]:
    return {readable_name(kernel) for kernel in twin.kernels}


def assert_same(twin: Twin, *, results: int) -> None:
    assert len(twin.differences) >= results
    assert all(difference.relative <= MOST for difference in twin.differences), twin.differences


@pytest.mark.parametrize("feature_map", SIMPLE)
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_both_passes(emulation, request, monkeypatch, head_dim, features, feature_map):
    """Grouped heads, padding, a tail."""
    monkeypatch.setenv(BACKWARD_SWITCH, "slices")
    problem = random_problem(70, head_dim=head_dim, features=features, feature_map=feature_map)
    mask = torch.ones(1, 70, dtype=torch.bool)
    mask[0, :3] = False
    twin = run_both(emulation, request, replace(problem, mask=mask), backward=True)
    form = f"<{head_dim},{features},{kind_of(feature_map)}>"
    kernels = {f"linear_attention_{name}{form}" for name in ("forward", "query_gradients", "key_gradients")}
    assert kernels <= names(twin)
    assert_same(twin, results=7)


@pytest.mark.parametrize("feature_map", ["hedgehog_exp", "hedgehog_joint"])
def test_the_other_maps(emulation, request, feature_map):
    problem = random_problem(66, feature_map=feature_map, heads=1)
    assert_same(run_both(emulation, request, problem, backward=True), results=8)


def test_segments_states_and_packed_rows(emulation, request):
    """Three segments of two chunks; rows of two batches packed at different places; gradients of the states too."""
    problem = random_problem(330, batch=2, heads=1)
    segment_ids = torch.zeros(2, 330, dtype=torch.long)
    segment_ids[0, 100:], segment_ids[1, 257:] = 1, 1
    twin = run_both(emulation, request, replace(problem, segment_ids=segment_ids), segments=3, backward=True)
    assert {"segment_prefix", "segment_suffix"} < names(twin)
    assert_same(twin, results=8)
    _, _, kv_state, k_sum = problem.cut(0, 100).run()
    goes_on = problem.cut(100, 180, LinearAttentionState(kv_state, k_sum))
    assert_same(run_both(emulation, request, goes_on, backward=True), results=8)


@pytest.mark.parametrize("features", [128, 256])
def test_forward_by_warpgroups(emulation, request, monkeypatch, features):
    monkeypatch.setenv(FORWARD_SWITCH, "wgmma")
    mask = torch.ones(1, 200, dtype=torch.bool)
    mask[0, :5] = False
    problem = replace(random_problem(200, head_dim=128, features=features), mask=mask)
    twin = run_both(emulation, request, problem)
    assert names(twin) == {f"linear_attention_forward_hopper<128,{features},fused>"}
    assert_same(twin, results=4)


@pytest.mark.parametrize("kind", ["whole", "wgmma"])
def test_backward_with_whole_values(emulation, request, monkeypatch, kind):
    monkeypatch.setenv(BACKWARD_SWITCH, kind)
    problem = random_problem(140, head_dim=128, features=256, heads=1)
    twin = run_both(emulation, request, problem, backward=True)
    assert names(twin) >= {
        "linear_attention_forward<128,256,fused>",
        f"linear_attention_query_gradients<128,256,{kind}>",
        f"linear_attention_key_gradients<128,256,{kind}>",
        "linear_attention_input_gradients<128,256,fused>",
    }
    assert_same(twin, results=8)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("feature_map", SIMPLE)
@pytest.mark.parametrize(("head_dim", "features"), SHAPES)
def test_decoding(emulation, request, head_dim, features, feature_map, splits):
    problem = random_problem(1, head_dim=head_dim, features=features, feature_map=feature_map, batch=2)
    generator = torch.Generator().manual_seed(3)
    state = torch.rand(2, 2, features, head_dim, generator=generator), torch.rand(2, 2, features, generator=generator)
    weights = problem.weight_q, problem.weight_k
    mask = torch.tensor([[True], [False]])
    with twin_of(emulation, seed=zlib.crc32(request.node.name.encode())) as twin:
        linear_attention_token(
            problem.q, problem.k, problem.v, *weights, mask, *state, problem.feature_map, EPS, splits
        )
    [name] = names(twin)
    assert name.startswith(f"linear_attention_decode<{head_dim},{features},{kind_of(feature_map)}")
    assert_same(twin, results=3)


def test_every_kernel_has_a_case_here():
    """By the names in the PTX of all sources; decode is made thrice of each shape, for its splits."""
    made = [readable_name(name) for text in PTX.values() for name in read_programs(text)]
    shapes = [f"<{d},{f},{kind}>" for d, f in SHAPES for kind in ("fused", "given")]
    here = [f"linear_attention_{what}{shape}" for what in ("forward", *_GRADIENTS) for shape in shapes]
    here += [f"linear_attention_{what}<128,256,{kind}>" for what in _GRADIENTS for kind in ("whole", "wgmma")]
    here += [f"linear_attention_forward_hopper<128,{features},fused>" for features in (128, 256)]
    here += ["linear_attention_input_gradients<128,256,fused>", "segment_prefix", "segment_suffix"]
    decode = [name for name in made if "decode" in name]
    assert len(decode) == 3 * len(shapes)
    assert sorted(name for name in made if "decode" not in name) == sorted(here)


_GRADIENTS = ("query_gradients", "key_gradients")


EDITS = {
    "ldmatrix gives two of its matrices in the wrong order": (
        r"(ldmatrix\S*\.trans\S* )\{(%\w+), (%\w+), (%\w+), (%\w+)\}",
        r"\1{\2, \4, \3, \5}",
    ),
    "A's registers in another order": (
        r"(mma\.sync\S* \{[^}]*\}, )\{(%\w+), (%\w+), (%\w+), (%\w+)\}",
        r"\1{\2, \4, \3, \5}",
    ),
    "bf16 packed the wrong way round": (
        r"cvt\.rn\.bf16x2\.f32 (%\w+), (%\w+), (%\w+);",
        r"cvt.rn.bf16x2.f32 \1, \3, \2;",
    ),
    "copies not waited for": (r"cp\.async\.wait_group 0;", "cp.async.wait_group 1;"),
}


@pytest.mark.parametrize("mistake", EDITS)
def test_a_mistake_in_the_assembly_would_show(emulation, request, mistake):
    pattern, replacement = EDITS[mistake]

    def edit(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text)
        assert count
        return changed

    problem = random_problem(70, head_dim=64, features=128, heads=1)
    try:
        twin = run_both(emulation, request, problem, machine=lambda name: edited(name, edit))
    except Fault:
        return
    assert any(difference.relative > 10 * MOST for difference in twin.differences), twin.differences


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"(wgmma\.mma_async\S* .*, p, 1, 1, )0, 1;", r"\g<1>0, 0;"),  # B's layout
        (r"wgmma\.wait_group\.sync\.aligned \d+;", "wgmma.wait_group.sync.aligned 7;"),
        (r"(stmatrix\S*) (\[%\w+\]), \{(%\w+), (%\w+), (%\w+), (%\w+)\}", r"\1 \2, {\3, \5, \4, \6}"),
        (r"bar\.arrive (%\w+), (%\w+);", ""),
        (r"prmt\.b32 (%\w+), (%\w+), (%\w+), 0x7632;", r"prmt.b32 \1, \2, \3, 0x5410;"),
    ],
    ids=["layout", "wait", "stmatrix", "arrive", "halves"],
)
def test_a_mistake_in_wgmmas_assembly_would_show(emulation, request, monkeypatch, pattern, replacement):
    monkeypatch.setenv(FORWARD_SWITCH, "wgmma")

    def edit(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text)
        assert count
        return changed

    problem = random_problem(70, head_dim=128, features=128, heads=1)
    try:
        twin = run_both(emulation, request, problem, machine=lambda name: edited(name, edit))
    except Fault:
        return
    assert any(difference.relative > 10 * MOST for difference in twin.differences), twin.differences
