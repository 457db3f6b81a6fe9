"""What the interpreter cannot show: full sizes, bits in any batch, CUDA graphs."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels.common import cuda
from dsv4.kernels.common.linear_plan import cut
from dsv4.kernels.linear import (
    joined_wide_linear,
    joined_wide_linear_sm90,
    linear_fp8,
    linear_fp8_prompt_sm90,
    linear_fp8_sm90,
    wide_linear,
    wide_linear_sm90,
)
from dsv4.ops import linear as ops
from dsv4.reference import linear as oracle
from dsv4.testing.cases.linear import JOINED_FLASH, fp8_weight, joined_args, tokens
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal
from support.real_sizes import LINEAR_SHAPES, fp8_weight_on_gpu, launched, needs_hopper
from support.wide_error import assert_within, wide_error

pytestmark = pytest.mark.gpu

COUNTS = (1, 2, 8, 9, 16, 17, 32, 33, 63, 64)
PROMPTS = (65, 128, 129, 300, 1000, 1024)


def weight_of(name: str) -> tuple[Tensor, Tensor, int]:
    N, K, groups = LINEAR_SHAPES[name]
    return *fp8_weight_on_gpu(N, K), groups


@pytest.mark.parametrize("quantize", [False, True], ids=["w8a16", "w8a8"])
@pytest.mark.parametrize("name", LINEAR_SHAPES)
def test_every_shape_at_full_size(name: str, quantize: bool) -> None:
    """Error, and the same bits for a token alone, among others, and in a prompt."""
    weight, scale, groups = weight_of(name)
    x = tokens(200, groups * weight.shape[1], device="cuda")
    x[5] *= 1e4 / x[5].abs().max()
    every = ops.linear_fp8(x, weight, scale, groups, quantize)
    exact = oracle.linear_fp8(x[:40].double(), weight, scale, groups, quantize)
    same = oracle.linear_fp8(x[:40], weight, scale, groups, quantize)
    for t in range(0, 40, 13):
        assert_as_exact_as(f"token {t}", every[t], same[t], exact[t])
    assert (every[:40].double() - exact).norm() <= 3e-3 * exact.norm()
    for T in COUNTS:
        got = ops.linear_fp8(x[:T], weight, scale, groups, quantize)
        assert_bits_equal(f"{T} tokens", got, every[:T])
    assert_bits_equal(
        "alone", ops.linear_fp8(x[50:51], weight, scale, groups, quantize), every[50:51]
    )


@pytest.mark.parametrize("quantize", [False, True], ids=["w8a16", "w8a8"])
@pytest.mark.parametrize("name", ["flash-wo_a", "flash-wq_a_wkv", "flash-wq_b", "pro-wo_b"])
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64])
def test_kernels_agree_to_the_bit(num_tokens: int, name: str, quantize: bool) -> None:
    needs_hopper()
    weight, scale, groups = weight_of(name)
    x = tokens(num_tokens, groups * weight.shape[1], device="cuda")
    args = x, weight, scale, groups, quantize
    assert_bits_equal("y", launched(linear_fp8_sm90, *args), launched(linear_fp8, *args))


def launched_prompt(x: Tensor, weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """The result of the kernel for prompts; NaN where it, or what it reads, is not written."""
    out = linear_fp8_prompt_sm90.outputs(x, weight, scale, groups, False)
    for t in out:
        t.fill_(float("nan"))
    linear_fp8_prompt_sm90.launch(x, weight, scale, groups, False, out)
    return out[0]


@pytest.mark.parametrize("is_fp32", [False, True], ids=["e8m0", "fp32"])
@pytest.mark.parametrize("name", LINEAR_SHAPES)
def test_kernels_of_prompts_agree_to_the_bit(name: str, is_fp32: bool) -> None:
    needs_hopper()
    weight, scale, groups = weight_of(name)
    if is_fp32:
        scale = scale.float() * 1.3  # no power of two
    x = tokens(PROMPTS[-1], groups * weight.shape[1], device="cuda")
    for T in PROMPTS:
        args = x[:T], weight, scale, groups
        want = launched(linear_fp8, *args, False)
        for turn in range(10 if T in PROMPTS[2:4] else 2):
            assert_bits_equal(f"{T} tokens, run {turn}", launched_prompt(*args), want)


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", ["flash-wo_a", "flash-wq_a_wkv", "flash-wo_b", "pro-wo_b"])
def test_prompts_in_every_form_agree_to_the_bit(
    name: str, is_split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_hopper()
    weight, scale, groups = weight_of(name)
    parts = cut(*weight.shape, groups).num_chunks if is_split else 1
    monkeypatch.setattr(linear_fp8_prompt_sm90, "num_parts", lambda *shape: parts)
    x = tokens(1300, groups * weight.shape[1], device="cuda")
    x[3, 7] = float("nan")  # of no concern to another token, or to rows of another group
    is_nan = torch.arange(len(weight), device="cuda") < len(weight) // groups
    for T in (70, 129, 300, 1300):
        args = x[:T], weight, scale, groups
        got, want = launched_prompt(*args), launched(linear_fp8, *args, False)
        for y in (got, want):
            assert torch.equal(y[3].isnan(), is_nan)
            y[3, is_nan] = 0
        assert_bits_equal(f"{T} tokens", got, want)


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 300])
def test_a_chain_in_a_graph_equals_single_steps(num_tokens: int) -> None:
    """Each reads what the one before wrote, and they overlap: the order must hold."""
    shapes = [(4096, 4096), (2048, 4096), (1024, 2048), (4096, 1024)] * 3
    weights = [fp8_weight(N, K, seed=i, device="cuda") for i, (N, K) in enumerate(shapes)]
    x = tokens(num_tokens, 4096, device="cuda")

    def chain(y: Tensor, wait: bool) -> Tensor:
        for weight, scale in weights:
            y = ops.linear_fp8(y, weight, scale)
            if wait:
                torch.cuda.synchronize()
        return y

    want = chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, False)
    for _ in range(20):
        got.fill_(float("nan"))
        graph.replay()
        assert_bits_equal("y", got, want)


def test_fp32_scales_and_odd_shapes() -> None:
    for N, K in ((4096, 2048), (200, 300), (64, 128)):
        weight, scale = fp8_weight(N, K, "F32", device="cuda")
        scale = scale * 1.3  # no power of two
        x = tokens(70, K, device="cuda")
        every = ops.linear_fp8(x, weight, scale)
        exact = oracle.linear_fp8(x.double(), weight, scale)
        assert_as_exact_as("y", every, oracle.linear_fp8(x, weight, scale), exact)
        for T in (1, 20, 64):
            assert_bits_equal(f"{T}", ops.linear_fp8(x[:T], weight, scale), every[:T])


def test_torch_compile_records_the_op() -> None:
    weight, scale = fp8_weight(256, 512, device="cuda")
    x = tokens(3, 512, device="cuda")

    @torch.compile(fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return ops.linear_fp8(x, weight, scale).float() + 1

    assert_bits_equal("y", step(x), ops.linear_fp8(x, weight, scale).float() + 1)


# BF16 weights. Of the gate (whole and with fewer experts), compressors, head weights; of Pro; with
# rows that fill no tile, and with few columns.
WIDE_FEW = [
    (256, 4096), (160, 4096), (2624, 4096), (1024, 4096), (2048, 4096), (64, 4096), (384, 7168),
    (2624, 7168), (1024, 7168), (64, 7168), (4096, 7168), (8448, 4096), (70, 512), (1000, 1536),
    (5, 640),
]  # fmt: skip


def wide_weight(shape: tuple[int, int]) -> Tensor:
    g = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, device="cuda", generator=g).to(torch.bfloat16) / 64


@pytest.mark.parametrize("shape", [*WIDE_FEW, (129280, 4096), (200, 300)], ids=str)
def test_wide_linear_at_full_size(shape: tuple[int, int]) -> None:
    """Error, and the same bits for a token alone, among others, and in a prompt."""
    weight, x = wide_weight(shape), tokens(200, shape[1], device="cuda")
    every = ops.wide_linear(x, weight)
    exact = oracle.wide_linear(x[:20].double(), weight.double())
    assert_within("y", every[:20], exact, wide_error(x[:20], weight))
    for T in COUNTS:
        assert_bits_equal(f"{T} tokens", ops.wide_linear(x[:T], weight), every[:T])
    assert_bits_equal("alone", ops.wide_linear(x[50:51], weight), every[50:51])


@pytest.mark.parametrize("shape", WIDE_FEW, ids=str)
def test_wide_kernels_agree_to_the_bit(shape: tuple[int, int]) -> None:
    needs_hopper()
    weight, x = wide_weight(shape), tokens(64, shape[1], device="cuda")
    x[3, 7] = float("nan")  # of no other token's concern
    for T in COUNTS:
        args = x[:T], weight
        want = launched(wide_linear, *args)
        assert_bits_equal(f"{T} tokens", launched(wide_linear_sm90, *args), want)


@pytest.mark.parametrize("name", JOINED_FLASH)
def test_joined_kernels_agree_to_the_bit(name: str) -> None:
    needs_hopper()
    for T in COUNTS:
        args = tuple(joined_args(T, 4096, JOINED_FLASH[name], device="cuda").values())
        want = launched(joined_wide_linear, *args)
        assert_bits_equal(f"{T} tokens", launched(joined_wide_linear_sm90, *args), want)


@pytest.mark.parametrize("T", [1, 16, 32, 64])
@pytest.mark.parametrize("shape", WIDE_FEW, ids=str)
def test_all_blocks_of_a_wide_weight_run_at_once(shape: tuple[int, int], T: int) -> None:
    """A second wave would double the time; clusters do not fit everywhere."""
    needs_hopper()
    p = wide_linear_sm90.plan(T, *shape)
    source = wide_linear_sm90.wide_linear_kernel(p)
    kernel = cuda.load(source, torch.device("cuda", torch.cuda.current_device()), p.shared)
    config, size = cuda.driver.CUlaunchConfig(), cuda.driver.CUlaunchAttribute()
    config.gridDimX, config.blockDimX = p.grid, wide_linear_sm90.THREADS
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.sharedMemBytes = p.shared
    size.id = cuda.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size.value.clusterDim.x = p.defines["CLUSTER"]
    size.value.clusterDim.y = size.value.clusterDim.z = 1
    config.attrs, config.numAttrs = [size], 1
    clusters = cuda.driver_call("cuOccupancyMaxActiveClusters", kernel.function, config)
    assert clusters * p.defines["CLUSTER"] >= p.grid


@pytest.mark.parametrize("num_tokens", [1, 20, 64])
def test_wide_linears_in_a_chain_wait_for_their_input(num_tokens: int) -> None:
    """Each starts while the kernel that writes its input still runs."""
    fp8 = [fp8_weight(4096, 4096, seed=i, device="cuda") for i in range(4)]
    wide, joined = wide_weight((256, 4096)), wide_weight((2624, 4096))
    rest = joined_args(num_tokens, 4096, JOINED_FLASH["csa"], device="cuda")
    x = tokens(num_tokens, 4096, device="cuda")

    def chain(y: Tensor, wait: bool) -> list[Tensor]:
        found = []
        for weight, scale in fp8:
            y = ops.linear_fp8(y, weight, scale)
            if wait:
                torch.cuda.synchronize()
            found.append(ops.wide_linear(y, wide))
            found.append(ops.joined_wide_linear(**rest | {"x": y, "weight": joined}))
        return found

    want = chain(x, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(x, False)
    for _ in range(20):
        for t in got:
            t.fill_(float("nan"))
        graph.replay()
        for i, (t, w) in enumerate(zip(got, want, strict=True)):
            assert_bits_equal(f"y[{i}]", t, w)
