"""Plans of the FP8 linears of few tokens on Hopper: they fit, and hold all of x and of the sums."""

import pytest
import torch

from dsv4.kernels.common.linear_plan import cut
from dsv4.kernels.linear import linear_fp8
from dsv4.kernels.linear.linear_fp8_sm90 import SHARED_BYTES, plan
from dsv4.testing.cases.linear import FLASH, PRO

SHAPES = {f"flash-{k}": v for k, v in FLASH.items()} | {f"pro-{k}": v for k, v in PRO.items()}
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
        assert d["PARTS"] <= 48


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
