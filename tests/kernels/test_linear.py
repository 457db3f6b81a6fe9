"""dsv4.kernels.linear against dsv4.reference.linear: error against FP64, edges, arguments."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.errors import KernelUnavailable
from dsv4.core.formats import FP8_BLOCK128, BlockScaledTensor
from dsv4.kernels.common import cuda, linear_plan
from dsv4.kernels.common.linear_plan import cut, wide_cut
from dsv4.kernels.common.linear_weights import join_rows, split_rows
from dsv4.kernels.linear import linear_fp8, linear_fp8_prompt_sm90, wide_linear, wide_linear_sm90
from dsv4.ops import linear as ops
from dsv4.reference import linear as oracle
from dsv4.reference.quant import dequantize, fp8_act_dequantize, fp8_act_quantize
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.linear import FLASH, PRO, WIDE_FLASH, fp8_weight, tokens
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal
from support.wide_error import assert_within, wide_error

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

F32_SCALE = {"scale_dtype": "F32"}
# Rows, columns, groups: tiles with an end, columns that are no multiple of 128, 64 or 16; of nano.
SHAPES = [(256, 512, 1), (200, 300, 1), (256, 256, 2), (96, 128, 3), (320, 1536, 1), (128, 100, 1)]


def relative_l2(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("kwargs", [{}, F32_SCALE], ids=["e8m0", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_linear_fp8_matches_oracle(
    num_tokens: int, shape: tuple[int, int, int], kwargs: dict
) -> None:
    N, K, groups = shape
    weight, scale = fp8_weight(N, K, device=DEVICE, **kwargs)
    x = tokens(num_tokens, groups * K, device=DEVICE)
    got = ops.linear_fp8(x, weight, scale, groups)
    exact = oracle.linear_fp8(x.double(), weight, scale, groups)
    assert_as_exact_as("y", got, oracle.linear_fp8(x, weight, scale, groups), exact)
    assert relative_l2(got, exact) <= 3e-3


@pytest.mark.parametrize("shape", [(256, 512, 1), (256, 256, 2), (192, 128, 1)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17, 70])
def test_quantised_input_matches_oracle(num_tokens: int, shape: tuple[int, int, int]) -> None:
    N, K, groups = shape
    weight, scale = fp8_weight(N, K, device=DEVICE)
    x = tokens(num_tokens, groups * K, device=DEVICE)
    got = ops.linear_fp8(x, weight, scale, groups, True)
    exact = oracle.linear_fp8(x.double(), weight, scale, groups, True)
    assert_as_exact_as("y", got, oracle.linear_fp8(x, weight, scale, groups, True), exact)
    assert relative_l2(got, exact) <= 3e-3
    unquantised = oracle.linear_fp8(x.double(), weight, scale, groups)
    assert 0.01 < relative_l2(got, unquantised) < 0.05  # 3 mantissa bits


def test_the_oracle_is_the_dequantised_product() -> None:
    weight, scale = fp8_weight(96, 256)
    x = tokens(5, 512)
    w = dequantize(BlockScaledTensor(FP8_BLOCK128, weight, scale), torch.float64)
    for quantize in (False, True):
        used = fp8_act_dequantize(*fp8_act_quantize(x)) if quantize else x
        halves = used.double().split(256, dim=1)
        want = torch.cat([h @ p.T for h, p in zip(halves, w.split(48), strict=True)], dim=1)
        got = oracle.linear_fp8(x.double(), weight, scale, 2, quantize)
        assert_bits_equal("y", got, want)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("exponent", [-40, 40])
def test_extreme_scales_stay_exact(exponent: int, quantize: bool) -> None:
    """One nonzero column: the result is a product, rounded once."""
    weight, scale = fp8_weight(256, 256, device=DEVICE)
    scale = torch.full_like(scale.view(torch.uint8), 127 + exponent).view(scale.dtype)
    x = torch.zeros(3, 256, dtype=torch.bfloat16, device=DEVICE)
    x[:, 37] = torch.tensor([1.0, -1e4, 2.0**-20], device=DEVICE)
    got = ops.linear_fp8(x, weight, scale, 1, quantize)
    want = oracle.linear_fp8(x.double(), weight, scale, 1, quantize).to(torch.bfloat16)
    assert bool((got == want).all())


@pytest.mark.parametrize("quantize", [False, True])
def test_large_and_non_finite_tokens(quantize: bool) -> None:
    weight, scale = fp8_weight(256, 512, device=DEVICE)
    x = tokens(5, 512, device=DEVICE)
    want = ops.linear_fp8(x, weight, scale, 1, quantize)
    x[1] *= 1e4 / x[1].abs().max()
    x[3, 7] = float("nan")
    got = ops.linear_fp8(x, weight, scale, 1, quantize)
    assert bool(got[1].isfinite().all())
    assert bool(got[3].isnan().all())  # and no other token
    exact = oracle.linear_fp8(x[1:2].double(), weight, scale, 1, quantize)
    assert relative_l2(got[1:2], exact) <= 3e-3
    others = [0, 2, 4]
    assert_bits_equal("others", got[others], want[others])


def test_sums_of_integers_are_exact_however_they_are_cut() -> None:
    weight = torch.randint(-8, 9, (256, 1536), generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.float8_e4m3fn).to(DEVICE)
    scale = torch.full((2, 12), 127, dtype=torch.uint8, device=DEVICE)
    scale = scale.view(torch.float8_e8m0fnu)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-4, 5, (70, 1536), generator=g).to(torch.bfloat16).to(DEVICE)
    want = (x.double() @ weight.double().T).to(torch.bfloat16)
    for T in (1, 16, 33, 70):
        assert_bits_equal(f"{T} tokens", ops.linear_fp8(x[:T], weight, scale), want[:T])


@pytest.mark.parametrize("min_programs", [1, 1 << 30], ids=["whole", "split"])
def test_chunks_add_up_in_one_program_and_in_many(
    min_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_plan, "MIN_PROGRAMS", min_programs)
    assert min(cut(128, 1536).num_chunks, wide_cut(128, 1536).num_chunks) > 1
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 9, (128, 1536), generator=g).to(torch.bfloat16).to(DEVICE)
    x = torch.randint(-4, 5, (3, 1536), generator=g).to(torch.bfloat16).to(DEVICE)
    scale = torch.ones(1, 12, device=DEVICE)
    want = x.float() @ weight.float().T
    out = wide_linear.outputs(x, weight)
    wide_linear.launch(x, weight, out)
    assert_bits_equal("wide", out[0], want)
    kernel, fp8 = linear_fp8, weight.to(torch.float8_e4m3fn)
    out = kernel.outputs(x, fp8, scale, 1, False)
    kernel.launch(x, fp8, scale, 1, False, out)
    assert_bits_equal("fp8", out[0], want.to(torch.bfloat16))


def test_a_program_writes_rows_of_its_own_group_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 32 rows are smaller than a tile. Only the first program runs."""

    def first(*args: Any) -> linear_plan.TilePlan:
        return replace(linear_plan.tile_plan(*args), grid=(1, 1, 1))

    monkeypatch.setattr(linear_fp8, "tile_plan", first)
    weight, scale = fp8_weight(96, 128, device=DEVICE)
    x = tokens(2, 3 * 128, device=DEVICE)
    out = linear_fp8.outputs(x, weight, scale, 3, False)
    out[0].fill_(float("nan"))
    linear_fp8.launch(x, weight, scale, 3, False, out)
    assert bool(out[0][:, :32].isfinite().all())
    assert bool(out[0][:, 32:].isnan().all())


def test_the_cut_covers_every_column_once() -> None:
    for N, K, groups in [*FLASH.values(), *PRO.values(), *SHAPES]:
        c = cut(N, K, groups)
        blocks = -(-K // 128)
        assert (c.num_chunks - 1) * c.chunk < blocks <= c.num_chunks * c.chunk
        if c.tiles:
            assert N // groups % (64 * c.tiles) == 0
            assert (c.cluster - 1) * c.chunks * c.chunk < blocks
            assert c.num_chunks <= c.cluster * c.chunks
    assert all(cut(*shape).tiles for shape in [*FLASH.values(), *PRO.values()])


def test_the_wide_cut_covers_every_column_once_and_runs_at_once() -> None:
    shapes = [(160, 4096), (2624, 4096), (384, 7168), (2624, 7168), (129280, 4096), (200, 300)]
    for N, K in [*WIDE_FLASH.values(), *shapes, *(s[:2] for s in SHAPES)]:
        c, blocks = wide_cut(N, K), -(-K // 128)
        firsts = [c.first_block(i, K) for i in range(c.num_chunks + 1)]
        assert firsts[0] == 0
        assert firsts[-1] == blocks
        sizes = [b - a for a, b in pairwise(firsts)]
        assert min(sizes) > 0
        assert max(sizes) - min(sizes) <= 1
        if c.cluster:
            assert c.num_chunks == 4 * c.cluster
            assert -(-N // c.rows) * c.cluster <= linear_plan.AT_ONCE.get(c.cluster, 96)
    assert all(wide_cut(N, K).cluster for N, K in WIDE_FLASH.values())


def test_few_blocks_stream_a_wide_weight_that_many_would() -> None:
    """The gate, too, is pulled by more SMs than it has tiles of 64 rows."""
    for N, K, least in ((160, 4096, 64), (256, 4096, 64), (1024, 4096, 96), (2624, 4096, 82)):
        for T in (1, 8, 9, 16, 17, 32, 33, 64):
            p = wide_linear_sm90.plan(T, N, K)
            assert p.grid >= least
            assert p.shared <= 227 << 10
            assert p.defines["NTOK"] >= T
            assert p.defines["DEPTH"] >= 2
    assert wide_linear_sm90.plan(1, 1024, 4096).defines["DEPTH"] == 4  # all of the longest chunk


def test_which_weights_go_to_the_kernel_for_few_tokens() -> None:
    x, weight = tokens(64, 4096), torch.empty(256, 4096, dtype=torch.bfloat16)
    assert wide_linear_sm90.takes(x, weight)
    assert not wide_linear_sm90.takes(x[:0], weight)
    assert not wide_linear_sm90.takes(tokens(65, 4096), weight)
    assert not wide_linear_sm90.takes(x, weight.new_empty(129280, 4096, device="meta"))
    for K in (384, 4096 - 64):  # fewer blocks than chunks; half a block
        assert not wide_linear_sm90.takes(x[:, :K], weight[:, :K])


# What changes in a call of 65 tokens, [256, 256] in 2 groups -> whether it is one of a prompt.
PROMPT_CALLS: list[tuple[dict[str, Any], bool]] = [
    ({}, True), ({"T": 64}, False), ({"T": 1000}, True), ({"quantize_input": True}, False),
    ({"shape": (200, 256, 1)}, False), ({"shape": (256, 192, 1)}, False), ({"groups": 4}, False),
    ({"shape": (256, 300, 1)}, False), ({"offset": 1}, False),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), PROMPT_CALLS, ids=lambda p: str(p))
def test_which_calls_go_to_the_kernel_for_prompts(
    change: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"T": 65, "shape": (256, 256, 2), "quantize_input": False, "offset": 0} | change
    N, K, groups = call["shape"]
    groups, taken = call.get("groups", groups), []

    def spy(*args: Any) -> None:
        taken.append(args)

    spec = KernelSpec("linear_fp8/spy", spy, runs_on_cpu=True)
    monkeypatch.setattr(ops, "LINEAR_FP8_PROMPT", (spec,))
    flat = tokens(1, call["T"] * groups * K + 8).flatten()
    x = flat[call["offset"] :][: call["T"] * groups * K].unflatten(0, (call["T"], -1))
    weight, scale = fp8_weight(N, K)
    for name in ("LINEAR_FP8", "LINEAR_FP8_ANY"):
        other = KernelSpec("linear_fp8/other", lambda *args: None, runs_on_cpu=True)
        monkeypatch.setattr(ops, name, (other,))
    ops.linear_fp8(x, weight, scale, groups, call["quantize_input"])
    assert bool(taken) == expected


def test_prompts_have_room_for_whole_tiles_and_sums_of_chunks() -> None:
    calls = ((1024, 4096, 1), 130), ((2048, 512, 8), 65), ((256, 256, 2), 999), (FLASH["wo_b"], 130)
    for (N, K, groups), T in calls:
        x, weight = tokens(T, groups * K), torch.empty(N, K, dtype=torch.float8_e4m3fn)
        y, images, partial = linear_fp8_prompt_sm90.outputs(x, weight, weight, groups, False)
        assert y.shape == (T, N)
        parts = linear_fp8_prompt_sm90.num_parts(T, N, K, groups)
        assert parts in (1, cut(N, K, groups).num_chunks)
        assert partial.numel() == (parts * T * N if parts > 1 else 0)
        assert images.numel() == -(-T // 128) * 128 * groups * K
    assert linear_fp8_prompt_sm90.num_parts(130, 1024, 4096, 1) > 1
    assert linear_fp8_prompt_sm90.num_parts(8192, 1024, 4096, 1) == 1
    measured = (128, 512, 4096, True), (512, 1536, 4096, False), (1024, 512, 4096, False)
    for T, N, K, is_split in measured:  # which way was faster
        assert (linear_fp8_prompt_sm90.num_parts(T, N, K, 1) > 1) == is_split
    assert linear_fp8_prompt_sm90.CONFIG["shared_bytes"] <= 227 << 10


def test_the_first_prompt_loads_what_one_of_any_size_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So warm-up meets every binary: another size starts one kernel more or less, of those."""
    loaded: list[tuple[cuda.Source, int]] = []
    launched: list[str] = []

    class Kernel:
        num_sms = 132

        def __init__(self, name: str) -> None:
            self.name = name

        def launch(self, *args: Any, **flags: bool) -> None:
            launched.append(self.name)

    def load(source: cuda.Source, device: torch.device, shared: int) -> Kernel:
        loaded.append((source, shared))
        return Kernel(source.name)

    monkeypatch.setattr(cuda, "load", load)
    weight, scale = fp8_weight(128, 1536)
    runs = {}
    for T, parts in ((65, 1), (65, 4), (300, 1), (300, 4)):
        monkeypatch.setattr(linear_fp8_prompt_sm90, "num_parts", lambda *shape, n=parts: n)
        args = tokens(T, 1536), weight, scale, 1, False
        linear_fp8_prompt_sm90.launch(*args, linear_fp8_prompt_sm90.outputs(*args))
        runs[T, parts] = set(loaded)
        assert len(launched) == (3 if parts > 1 else 2)
        assert set(launched) <= {source.name for source, _ in loaded}
        loaded.clear()
        launched.clear()
    assert len(runs[65, 1]) == 3
    assert all(run == runs[65, 1] for run in runs.values())


def test_what_is_no_prompt_is_refused_by_name() -> None:
    weight, scale = fp8_weight(256, 256)
    for x, quantize in ((tokens(64, 256), False), (tokens(65, 256), True)):
        out = linear_fp8_prompt_sm90.outputs(x, weight, scale, 1, quantize)
        with pytest.raises(KernelUnavailable, match="linear_fp8/sm90_prompt: expected more than"):
            linear_fp8_prompt_sm90.launch(x, weight, scale, 1, quantize, out)


def test_results_of_prompts_are_aligned() -> None:
    """Results leave 16 bytes at a time."""
    weight, scale = fp8_weight(256, 256)
    args = tokens(65, 256), weight, scale, 1, False
    y, *rest = linear_fp8_prompt_sm90.outputs(*args)
    odd = y.new_empty(y.numel() + 1)[1:].view(y.shape)
    with pytest.raises(ValueError, match="y: expected an address that is a multiple of 16"):
        linear_fp8_prompt_sm90.launch(*args, (odd, *rest))


def test_more_tokens_than_the_kernel_for_few_takes_are_refused_by_name() -> None:
    x, weight = tokens(65, 256), torch.randn(256, 256).to(torch.bfloat16)
    with pytest.raises(KernelUnavailable, match="wide_linear/sm90: at most 64 tokens, got 65"):
        wide_linear_sm90.launch(x, weight, wide_linear.outputs(x, weight))


def test_no_tokens() -> None:
    weight, scale = fp8_weight(256, 512, device=DEVICE)
    y = ops.linear_fp8(tokens(0, 512, device=DEVICE), weight, scale)
    assert y.shape == (0, 256)
    assert y.dtype == torch.bfloat16


def test_op_contract() -> None:
    weight, scale = fp8_weight(128, 256, device=DEVICE)
    args = tokens(3, 256, device=DEVICE), weight, scale
    # Without "test_schema", which compares the inputs by arithmetic that FP8 does not have.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.linear_fp8.op, args, test_utils=checks)
    before = [t.clone() for t in args]
    ops.linear_fp8(*args)
    for name, t, was in zip(("x", "weight", "scale"), args, before, strict=True):
        assert_bits_equal(name, t, was)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 256)}, r"x: expected torch.bfloat16"),
        ({"x": torch.zeros(3, 128, dtype=torch.bfloat16)}, r"x: expected shape \[T, 256\]"),
        ({"weight": torch.zeros(128, 256)}, r"weight: expected torch.float8_e4m3fn"),
        ({"scale": torch.zeros(1, 2, dtype=torch.uint8)}, r"scale: expected torch.float8_e8m0fnu"),
        ({"scale": torch.zeros(1, 3)}, r"scale: expected shape \[1, 2\]"),
        ({"groups": 3}, r"groups: expected a divisor of the 128 rows"),
        ({"groups": 0}, r"groups: expected an integer >= 1"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_a_bad_argument_is_named(change: dict, message: str) -> None:
    weight, scale = fp8_weight(128, 256)
    args = {"x": tokens(3, 256), "weight": weight, "scale": scale, "groups": 1} | change
    args = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in args.items()}
    with pytest.raises(ValueError, match=message):
        ops.linear_fp8(**args)


def test_groups_of_the_input_need_whole_blocks_to_be_quantised() -> None:
    weight, scale = fp8_weight(128, 192, device=DEVICE)
    with pytest.raises(ValueError, match="weight: expected columns in whole groups of 128"):
        ops.linear_fp8(tokens(3, 192, device=DEVICE), weight, scale, 1, True)


# Joined weights


@pytest.mark.parametrize("kwargs", [{}, F32_SCALE], ids=["e8m0", "fp32"])
def test_joined_weights_come_apart_and_multiply_alike(kwargs: dict) -> None:
    rows = [256, 128, 100]
    made = [fp8_weight(n, 256, seed=i, device=DEVICE, **kwargs) for i, n in enumerate(rows)]
    parts = [BlockScaledTensor(FP8_BLOCK128, *w) for w in made]
    joined = join_rows(parts)
    for got, want in zip(split_rows(joined, rows), parts, strict=True):
        assert_bits_equal("data", got.data, want.data)
        assert_bits_equal("scale", got.scale, want.scale)
    x = tokens(3, 256, device=DEVICE)
    got = ops.linear_fp8(x, joined.data, joined.scale).double()
    want = torch.cat([oracle.linear_fp8(x.double(), *w) for w in made], dim=1)
    assert relative_l2(got, want) <= 3e-3


def test_what_cannot_be_joined() -> None:
    whole, ragged, narrow = (
        BlockScaledTensor(FP8_BLOCK128, *fp8_weight(*s))
        for s in ((128, 256), (100, 256), (128, 128))
    )
    with pytest.raises(ValueError, match=r"parts\[0\]: expected a multiple of 128 rows, got 100"):
        join_rows([ragged, whole])
    with pytest.raises(ValueError, match=r"parts\[1\]: expected the columns"):
        join_rows([whole, narrow])
    with pytest.raises(ValueError, match="rows: expected a sum of 128"):
        split_rows(whole, [100, 100])


# BF16 weights, FP32 results


def bf16_weight(N: int, K: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(N, K, generator=g) * K**-0.5).to(torch.bfloat16).to(DEVICE)


@pytest.mark.parametrize("shape", [(64, 512), (256, 384), (100, 200), (16, 1536)], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17, 70])
def test_wide_linear_matches_oracle(num_tokens: int, shape: tuple[int, int]) -> None:
    weight, x = bf16_weight(*shape), tokens(num_tokens, shape[1], device=DEVICE)
    got = ops.wide_linear(x, weight)
    assert got.dtype == torch.float32
    exact = oracle.wide_linear(x.double(), weight.double())
    assert_within("y", got, exact, wide_error(x, weight))


@pytest.mark.parametrize("shape", [(256, 384), (100, 200), (16, 1536), (256, 4096)], ids=str)
def test_a_missing_block_is_beyond_the_error_of_wide_linear(shape: tuple[int, int]) -> None:
    """And so are a sum kept in BF16 and a row that is another's."""
    weight, x = bf16_weight(*shape), tokens(3, shape[1], seed=1, device=DEVICE)
    exact, limit = oracle.wide_linear(x.double(), weight.double()), wide_error(x, weight)
    assert_within("oracle", oracle.wide_linear(x, weight), exact, limit)
    less = x.clone()
    less[:, 128:256] = 0
    wrong = oracle.wide_linear(less.double(), weight.double()), exact.bfloat16(), exact.roll(1, 1)
    for got in wrong:
        for t in range(3):
            with pytest.raises(AssertionError, match="times the error allowed"):
                assert_within("y", got[t], exact[t], limit[t])


def test_wide_linear_of_nothing_and_its_contract() -> None:
    weight, x = bf16_weight(64, 256), tokens(3, 256, device=DEVICE)
    assert ops.wide_linear(x[:0], weight).shape == (0, 64)
    torch.library.opcheck(ops.wide_linear.op, (x, weight))
    with pytest.raises(ValueError, match="weight: expected shape"):
        ops.wide_linear(x, weight[:, :128].contiguous())
    with pytest.raises(ValueError, match="x: expected torch.bfloat16"):
        ops.wide_linear(x.float(), weight)
