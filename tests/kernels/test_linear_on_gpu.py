"""What the interpreter cannot show: full sizes, bits in any batch, CUDA graphs."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from dsv4.kernels.linear import linear_fp8, linear_fp8_sm90
from dsv4.ops import linear as ops
from dsv4.reference import linear as oracle
from dsv4.testing.cases.linear import FLASH, PRO, fp8_weight, tokens
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = pytest.mark.gpu

SHAPES = {f"flash-{k}": v for k, v in FLASH.items()} | {f"pro-{k}": v for k, v in PRO.items()}
COUNTS = (1, 2, 8, 9, 16, 17, 32, 33, 63, 64)


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs SM 9x")


def weight_of(name: str) -> tuple[Tensor, Tensor, int]:
    """On the device from the start: the large ones are 100 MB."""
    N, K, groups = SHAPES[name]
    g = torch.Generator("cuda").manual_seed(0)
    weight = 32 * torch.randn(N, K, device="cuda", generator=g)
    scale = torch.randint(114, 118, (-(-N // 128), K // 128), device="cuda", generator=g)
    scale = scale.to(torch.uint8).view(torch.float8_e8m0fnu)
    return weight.clamp(-448, 448).to(torch.float8_e4m3fn), scale, groups


def launched(
    kernel: ModuleType, x: Tensor, weight: Tensor, scale: Tensor, groups: int, quantize: bool
) -> Tensor:
    """The result of one kernel, whatever `select` would take; NaN where it writes nothing."""
    out = kernel.outputs(x, weight, scale, groups, quantize)
    for t in out[:2]:
        t.fill_(float("nan"))
    kernel.launch(x, weight, scale, groups, quantize, out)
    return out[0]


@pytest.mark.parametrize("quantize", [False, True], ids=["w8a16", "w8a8"])
@pytest.mark.parametrize("name", SHAPES)
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


@pytest.mark.parametrize("num_tokens", [1, 64])
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


@pytest.mark.parametrize("shape", [(256, 4096), (2048, 4096), (64, 7168), (129280, 4096)], ids=str)
def test_wide_linear_at_full_size(shape: tuple[int, int]) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(shape, device="cuda", generator=g).to(torch.bfloat16) / 64
    x = tokens(200, shape[1], device="cuda")
    every = ops.wide_linear(x, weight)
    exact = oracle.wide_linear(x[:20].double(), weight.double())
    assert (every[:20] - exact).norm() <= 1e-5 * exact.norm()
    for T in (1, 8, 17, 33, 64):
        assert_bits_equal(f"{T} tokens", ops.wide_linear(x[:T], weight), every[:T])
