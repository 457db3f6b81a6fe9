"""Plans of the FP8 linears of few tokens on Hopper: they fit, and hold all of x and of the sums.

And the text that the linear kernels share.
"""

import pytest
import torch
from torch import Tensor

from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.linear_plan import cut
from dsv4.kernels.linear import (
    joined_wide_linear_sm90,
    linear_fp8,
    linear_fp8_prompt_sm90,
    linear_fp8_sm90,
    linear_fp8_w8a8_sm90,
    wide_linear_sm90,
)
from dsv4.kernels.linear.linear_fp8_sm90 import (
    KEEP,
    MAX_PARTS,
    MAX_ROWS,
    ROUND,
    SHARED_BYTES,
    linear_fp8_kernel,
    plan,
    takes,
)
from dsv4.kernels.moe import moe_routed_sm90
from dsv4.testing.cases.linear import FLASH, PRO

SHAPES = {f"flash-{k}": v for k, v in FLASH.items()} | {f"pro-{k}": v for k, v in PRO.items()}
SHARING = (
    joined_wide_linear_sm90, linear_fp8_prompt_sm90, linear_fp8_sm90, linear_fp8_w8a8_sm90,
    moe_routed_sm90, wide_linear_sm90,
)  # fmt: skip
STEP, X_BLOCK = 32 << 10, 256  # bytes of weights, and of 128 columns of a token


@pytest.mark.parametrize("name", SHAPES)
def test_a_plan_fits_and_holds_a_whole_chunk(name: str) -> None:
    N, K, groups = SHAPES[name]
    c = cut(N, K, groups)
    for T in range(1, 65):
        p = plan(T, N, K, groups)
        d = p.defines
        assert p.shared <= SHARED_BYTES
        assert p.is_streamed or T <= 16
        if not p.is_streamed:
            continue
        assert d["NTOK"] >= T
        assert (d["CHUNK"], d["PARTS"]) == (c.chunk, c.num_chunks)
        assert p.grid == N // 256 * c.num_chunks
        passes = -(-c.chunk // d["STAGED"])
        assert passes == (2 if c.chunk > 8 and T > 32 else 1)
        x_bytes = d["STAGED"] * d["NTOK"] * X_BLOCK
        scales = 8 * c.chunk + 8  # of two blocks of 128 rows, and a word for the blocks' shares
        assert p.shared == x_bytes + d["DEPTH"] * STEP + scales
        assert d["EARLY"] <= d["DEPTH"] <= c.chunk
        assert d["PARTS"] <= MAX_PARTS


@pytest.mark.parametrize("T", [17, 30, 33, 64])
def test_partial_sums_and_words_have_room(T: int) -> None:
    for N, K, groups in SHAPES.values():
        c = cut(N, K, groups)
        x = torch.empty(T, groups * K, dtype=torch.bfloat16, device="meta")
        size = N, K, groups, c.num_chunks
        weight = torch.empty(N, K, dtype=torch.float8_e4m3fn, device="meta")
        _, partial, counters, *_ = linear_fp8.outputs(x, weight, weight, groups, False)
        assert partial.numel() >= c.num_chunks * N * -(-T // 8) * 8, size
        assert counters.numel() >= N // 256 * 2 + 1, size  # words of eight bytes, aligned


def test_rows_that_are_no_whole_blocks_go_sixteen_tokens_at_a_time() -> None:
    for T in (17, 64):
        p = plan(T, 384, 2048, 1)
        assert not p.is_streamed
        assert p.defines["NTOK"] == 16


def meta_call(T: int, N: int, K: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens and a weight that have no values."""
    x = torch.empty(T, groups * K, dtype=torch.bfloat16, device="meta")
    return x, torch.empty(N, K, dtype=torch.float8_e4m3fn, device="meta")


@pytest.mark.parametrize("T", [1, 8, 9, 16, 17, 64])
def test_weights_that_no_plan_fits_are_not_taken(T: int) -> None:
    """K too large for the shared memory of a cluster; rows or columns that are no whole tiles."""
    for N, K in ((4096, 73728), (384, 73728), (256, 49280)):
        x, weight = meta_call(T, N, K)
        assert takes(x, weight, 1), (N, K)
        p = plan(T, N, K, 1)
        assert p.shared <= SHARED_BYTES
        assert p.defines.get("PARTS", 0) <= MAX_PARTS
    for N, K in ((4096, 1 << 20), (384, 73856), (200, 4096), (256, 4000), (MAX_ROWS + 256, 1024)):
        x, weight = meta_call(T, N, K)
        assert not takes(x, weight, 1), (N, K)
        with pytest.raises(KernelUnavailable, match=rf"linear_fp8/sm90: .*got \[{N}, {K}\] in 1"):
            plan(T, N, K, 1)


@pytest.mark.parametrize("size", [64, 192, 1024, 65472, 65536, 131072, MAX_ROWS - 64, MAX_ROWS])
def test_a_row_tells_its_group_by_one_multiplication(size: int) -> None:
    row = torch.arange(0, MAX_ROWS, 64)
    assert torch.equal((row * (cuda.magic(size) % 2**32)) >> 32, row // size)


def test_which_calls_go_to_the_kernel_for_few_tokens() -> None:
    x, weight = meta_call(64, 512, 256, 2)
    assert takes(x, weight, 2)
    assert not takes(x[:0], weight, 2)
    assert not takes(meta_call(65, 512, 256, 2)[0], weight, 2)
    for groups in (0, 16):  # 16: half a tile each
        assert not takes(x, weight, groups)
    assert not takes(*meta_call(1, 193, 256, 3), 3)


def test_a_source_is_made_once_and_anew_for_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 17, 4096, 8192, 1
    first = linear_fp8_kernel(plan(*size), KEEP, True)
    assert linear_fp8_kernel(plan(*size), KEEP, True) is first
    others = [(size, ROUND, True), (size, KEEP, False), ((33, *size[1:]), KEEP, True)]
    assert len({first, *(linear_fp8_kernel(plan(*s), *rest) for s, *rest in others)}) == 4
    monkeypatch.setattr(linear_fp8_sm90, "PATIENCE", -1)
    linear_fp8_sm90.find_plan.cache_clear()
    impatient = linear_fp8_kernel(plan(*size), KEEP, True)
    linear_fp8_sm90.find_plan.cache_clear()
    assert dict(impatient.defines) == dict(first.defines) | {"PATIENCE": -1}


def test_kernels_follow_the_text_they_share() -> None:
    """So a change of that makes other cubins (tests/kernels/test_mhc.py has that of any source)."""
    for module in SHARING:
        for source, _ in module.sources():
            assert [path.name for path in source.before] == ["linear_device.cu"], source.name
            assert all(path.is_file() for path in source.before)
