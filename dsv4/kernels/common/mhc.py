"""mHC on tiles: the projection of a slab of columns, and what follows from the complete sums.

A token's projection is split into slabs of BLOCK_D columns, whatever the number of tokens, and
their partial sums are added in a fixed order: a token has the same bits alone and among others.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float, check_int
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import HARDWARE, cast, fp8_rows, rounded

N = 4  # streams; the model has no other value
GROUP = 128  # of the FP8 copy
BLOCK_T, BLOCK_D = 16, 64
MAPS_T = 32  # tokens of a warp that runs Sinkhorn
HIGH = tl.constexpr(-65536)  # the upper 16 bits of FP32
FUSED = {"enable_fp_fusion": True}


@triton.jit
def dot_exact(x, w, high, low, BF16: tl.constexpr):
    """Add x @ w to two sums. A BF16 x meets w in three BF16 parts, which hold its 24 bits."""
    if BF16:
        w_high = (w.to(tl.int32, bitcast=True) & HIGH).to(tl.float32, bitcast=True)
        rest = w - w_high
        w_mid = (rest.to(tl.int32, bitcast=True) & HIGH).to(tl.float32, bitcast=True)
        low = _dot(x, rest - w_mid, low)
        low = _dot(x, w_mid, low)
        high = _dot(x, w_high, high)
    else:
        high = tl.dot(x, w, high, input_precision="ieee")
    return high, low


@triton.jit
def _dot(x, part, acc):
    # The interpreter takes the bits of BF16 operands for integers.
    if HARDWARE:
        return tl.dot(x, part.to(tl.bfloat16), acc)
    return tl.dot(widen(x), part, acc)


@triton.jit
def project_slab(
    o_ptr, x_ptr, post_ptr, comb_ptr, fn_ptr, streams_ptr, partial_ptr, T, D: tl.constexpr,
    M: tl.constexpr, MP: tl.constexpr, BF16: tl.constexpr, POST: tl.constexpr,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums of one slab: M products and, in column M, the squares.

    With POST the streams are first made from `o` and the old ones, and stored.
    """
    slab = tl.program_id(1)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d, m = slab * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, MP)
    t_T1, live = t[:, None], (t < T)[:, None]
    mask = live & (d < D)[None, :]
    high, low = tl.zeros([BLOCK_T, MP], tl.float32), tl.zeros([BLOCK_T, MP], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    at = t_T1 * (N * D) + d[None, :]
    for k in tl.static_range(N):
        if POST:
            new = tl.load(post_ptr + t_T1 * N + k, live, 0.0)
            new = new * widen(tl.load(o_ptr + t_T1 * D + d[None, :], mask, 0.0))
            for j in tl.static_range(N):
                old = widen(tl.load(x_ptr + at + j * D, mask, 0.0))
                new += tl.load(comb_ptr + t_T1 * (N * N) + j * N + k, live, 0.0) * old
            x = cast(new, BF16)
            tl.store(streams_ptr + at + k * D, x, mask)
        else:
            x = tl.load(x_ptr + at + k * D, mask, 0.0)
        w_at = m[None, :] * (N * D) + k * D + d[:, None]
        w = tl.load(fn_ptr + w_at, (m < M)[None, :] & (d < D)[:, None], 0.0)
        high, low = dot_exact(x, w, high, low, BF16)
        wide = widen(x)
        squares += tl.sum(wide * wide, axis=1)
    out = tl.where(m[None, :] == M, squares[:, None], high + low)
    slabs: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tl.store(partial_ptr + (t_T1 * slabs + slab) * MP + m[None, :], out, live)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def mixes_of(
    partial_ptr, t, norm_eps, D: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """mhc_mixes of token t, [MP], from the sums of its slabs."""
    slabs: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    s, m = tl.arange(0, BLOCK_S)[:, None], tl.arange(0, MP)
    part = tl.load(partial_ptr + (t * slabs + s) * MP + m[None, :], s < slabs, 0.0)
    total = tl.sum(part, axis=0)
    mean = tl.sum(tl.where(m == M, total, 0.0), axis=0) / (N * D)
    return total * tl.div_rn(1.0, tl.sqrt_rn(mean + norm_eps))


@triton.jit
def store_collapsed(
    x_ptr, pre, norm_ptr, y_ptr, value_ptr, scale_ptr, t, norm_eps, D: tl.constexpr,
    BF16: tl.constexpr, QUANTISE: tl.constexpr, N: tl.constexpr, MP: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """RMSNorm of sum_j pre_j X_j, rounded once, and its FP8 form."""
    g, i = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, GROUP)[None, :]
    d, m = g * GROUP + i, tl.arange(0, MP)
    mask = d < D
    y = tl.zeros([BLOCK_G, GROUP], tl.float32)
    for j in tl.static_range(N):
        a = tl.sum(tl.where(m == j, pre, 0.0), axis=0)
        y += a * widen(tl.load(x_ptr + (t * N + j) * D + d, mask, 0.0))
    mean = tl.sum(tl.sum(y * y, axis=1), axis=0) / D
    y = y * tl.div_rn(1.0, tl.sqrt_rn(mean + norm_eps))
    y = rounded(y * widen(tl.load(norm_ptr + d, mask, 0.0)), BF16)
    tl.store(y_ptr + t * D + d, cast(y, BF16), mask)
    if QUANTISE:
        value, scale = fp8_rows(y)
        tl.store(value_ptr + t * D + d, value, mask)
        row = tl.arange(0, BLOCK_G)
        tl.store(scale_ptr + t * (D // GROUP) + row, scale, row < D // GROUP)


@triton.jit
def finish_kernel(
    x_ptr, partial_ptr, scale_ptr, base_ptr, norm_ptr, y_ptr, value_ptr, fp8_scale_ptr, norm_eps,
    eps, D: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BF16: tl.constexpr,
    QUANTISE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One token: complete sums, collapse and norm. The scaled mixes replace its first sums."""
    let_next_start()
    t = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MP)
    is_row = m < M
    # Gains of pre, post and comb; the head has one.
    gain = tl.load(scale_ptr + tl.minimum(m // N, 2) * (M > N), is_row, 0.0)
    base = tl.load(base_ptr + m, is_row, 0.0)
    wait_for_previous()
    a = mixes_of(partial_ptr, t, norm_eps, D, M, MP, N, BLOCK_D, BLOCK_S) * gain + base
    pre = sigmoid(a) + eps
    store_collapsed(
        x_ptr, pre, norm_ptr, y_ptr, value_ptr, fp8_scale_ptr, t, norm_eps, D, BF16, QUANTISE, N,
        MP, GROUP, BLOCK_G,
    )  # fmt: skip
    if M > N:
        slabs: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
        tl.store(partial_ptr + t * slabs * MP + m, a)


@triton.jit(do_not_specialize=["T"])
def maps_kernel(
    mixes_ptr, post_ptr, comb_ptr, T, stride, eps, ITERS: tl.constexpr, N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """post and comb of mhc_split_sinkhorn from scaled mixes. A lane has a token: no shuffles."""
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n, t_1T, live = tl.arange(0, N), t[None, :], (t < T)[None, :]
    c = tl.load(mixes_ptr + t_1T * stride + N + n[:, None], live, 0.0)
    tl.store(post_ptr + t_1T * N + n[:, None], 2 * sigmoid(c), live)
    at = n[:, None, None] * N + n[None, :, None]
    b = tl.load(mixes_ptr + t[None, None, :] * stride + 2 * N + at, live[None], 0.0)
    b = tl.exp(b - tl.max(b, axis=1)[:, None, :])
    b = tl.div_rn(b, tl.sum(b, axis=1)[:, None, :]) + eps
    b = tl.div_rn(b, tl.sum(b, axis=0)[None] + eps)
    for _ in range(ITERS - 1):
        b = tl.div_rn(b, tl.sum(b, axis=1)[:, None, :] + eps)
        b = tl.div_rn(b, tl.sum(b, axis=0)[None] + eps)
    tl.store(comb_ptr + t[None, None, :] * (N * N) + at, b, live[None])


def project(kernel: Any, T: int, D: int, rows: int, padded: int, *args: Any, bf16: bool) -> None:
    """Start the kernel of the slabs; `args` are its pointers."""
    grid = triton.cdiv(T, BLOCK_T), triton.cdiv(D, BLOCK_D)
    kernel[grid](
        *args, T, D=D, M=rows, MP=padded, BF16=bf16, N=N, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        num_warps=4, **FUSED,
    )  # fmt: skip


def finish(
    streams: Tensor, partial: Tensor, scale: Tensor, base: Tensor, norm: Tensor,
    results: tuple[Tensor | None, ...], iters: int, norm_eps: float, eps: float, quantise: bool,
) -> None:  # fmt: skip
    """Start the kernels of the tokens. results: y, post, comb, values, scales; None if not made."""
    T, _, D = streams.shape
    y, post, comb, value, fp8_scale = results
    finish_kernel[(T,)](
        streams, partial, scale, base, norm, y, None if value is None else value.view(torch.uint8),
        None if fp8_scale is None else fp8_scale.view(torch.uint8), norm_eps, eps, D=D,
        M=base.shape[0], MP=partial.shape[2], BF16=streams.dtype is torch.bfloat16,
        QUANTISE=quantise, N=N, GROUP=GROUP, BLOCK_D=BLOCK_D,
        BLOCK_S=triton.next_power_of_2(partial.shape[1]),
        BLOCK_G=triton.next_power_of_2(triton.cdiv(D, GROUP)), num_warps=8,
        **PDL, **FUSED,
    )  # fmt: skip
    if post is None:
        return
    maps_kernel[(triton.cdiv(T, MAPS_T),)](
        partial, post, comb, T, partial.shape[1] * partial.shape[2], eps, ITERS=iters, N=N,
        BLOCK_T=MAPS_T, num_warps=1, **PDL, **FUSED,
    )  # fmt: skip


def new_partial(x: Tensor, mp: int) -> Tensor:
    """Working memory: the sums of every slab [T, slabs, mp]. Need not be cleared."""
    T, _, D = x.shape
    return x.new_empty((T, triton.cdiv(D, BLOCK_D), mp), dtype=torch.float32)


def new_results(x: Tensor, quantise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, post, comb, values and scales, as dsv4.reference.mhc.mhc_pre_norm returns them."""
    T, n, D = x.shape
    D8 = D if quantise else 0
    return (
        x.new_empty(T, D),
        x.new_empty(T, n, dtype=torch.float32),
        x.new_empty(T, n, n, dtype=torch.float32),
        x.new_empty(T, D8, dtype=torch.float8_e4m3fn),
        x.new_empty(T, D8 // GROUP, dtype=torch.float8_e8m0fnu),
    )


def check_mhc(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, y: Tensor, rows: int,
    gains: int, **more: tuple[Tensor, str, torch.dtype],
) -> dict[str, int]:  # fmt: skip
    """What every op with a projection shares; -> sizes T and D."""
    sizes = check_tensors(
        x=(x, f"T {N} D", check_float("x", x)),
        fn=(fn, f"{rows} fn_columns", torch.float32),
        scale=(scale, str(gains), torch.float32),
        base=(base, str(rows), torch.float32),
        norm=(norm, "D", check_float("norm", norm)),
        y=(y, "T D", x.dtype),
        **more,
    )
    if sizes["fn_columns"] != N * sizes["D"]:
        raise ValueError(f"fn: expected shape [{rows}, {N * sizes['D']}], got {list(fn.shape)}")
    return sizes


def check_results(
    x: Tensor, iters: int, quantise: bool, out: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, str, torch.dtype]]:
    """Specs of post, comb, values and scales, the results behind y."""
    check_int("iters", iters)
    D = x.shape[-1]
    if quantise and D % GROUP:
        raise ValueError(f"x: expected a last dim divisible by {GROUP}, got {D}")
    D8 = D if quantise else 0
    post, comb, value, scale = out
    return {
        "out post": (post, f"T {N}", torch.float32),
        "out comb": (comb, f"T {N} {N}", torch.float32),
        "out value": (value, f"T {D8}", torch.float8_e4m3fn),
        "out scale": (scale, f"T {D8 // GROUP}", torch.float8_e8m0fnu),
    }
