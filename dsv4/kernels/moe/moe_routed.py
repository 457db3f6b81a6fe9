"""Routed experts, one program for one token's row block of one expert: right everywhere, not fast.

Every (token, expert) pair reads the expert's weights for itself, so it serves as the second oracle
of the tensor-core kernels and as what runs where they do not. Three launches: gate and up with
SwiGLU, down, and the sum over a token's experts in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.expert_tiles import COLUMNS, ROWS
from dsv4.kernels.common.bits import e2m1_value, e4m3_value, e8m0_value, narrow, widen
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.experts import tiled
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.experts:moe_routed"
CONFIG = {"num_warps": 4}
GROUPS = {"mxfp4": 32, "nvfp4": 16}
BLOCK_ROWS, BLOCK_K, BLOCK_OUT = 64, COLUMNS, 256


@triton.jit
def _rows_times(
    x_ptr, w_ptr, s_ptr, row, num_rows, K: tl.constexpr, GROUP: tl.constexpr,
    NVFP4: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """FP32 products of weight rows `row` with one vector of K inputs; BLOCK_K is a tile's 128."""
    acc = tl.zeros_like(row).to(tl.float32)
    live = (row < num_rows)[:, None]
    for k in range(0, K, BLOCK_K):
        pair = tl.arange(0, BLOCK_K // 2)[None, :]
        inside = live & (k + 2 * pair < K)
        at = tiled(row, K // 2, k // BLOCK_K, BLOCK_K // 2)[:, None] + pair
        byte = tl.load(w_ptr + at, inside, 0).to(tl.int32)
        at = tiled(row, K // GROUP, k // BLOCK_K, BLOCK_K // GROUP)[:, None] + 2 * pair // GROUP
        scale = tl.load(s_ptr + at, inside, 0).to(tl.int32)
        scale = e4m3_value(scale) if NVFP4 else e8m0_value(scale)
        even = widen(tl.load(x_ptr + k + 2 * pair, k + 2 * pair < K, 0.0))
        odd = widen(tl.load(x_ptr + k + 2 * pair + 1, k + 2 * pair < K, 0.0))
        terms = e2m1_value(byte & 15) * scale * even + e2m1_value(byte >> 4) * scale * odd
        acc += tl.sum(tl.where(inside, terms, 0.0), axis=1)
    return acc


@triton.jit
def _gate_up_kernel(
    x_ptr, ids_ptr, routing_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, g_ptr, hidden_ptr, limit,
    first_expert, num_experts, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    GROUP: tl.constexpr, NVFP4: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """hidden[pair] = routing * silu(min(gate, limit)) * clamp(up)."""
    let_next_start()
    wait_for_previous()
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = (tl.load(ids_ptr + pair) - first_expert).to(tl.int64)
    if (e >= 0) & (e < num_experts):
        x_ptr += pair // TOP_K * D
        at, scale_at = e * F * (D // 2), e * F * (D // GROUP)
        gate = _rows_times(x_ptr, w1_ptr + at, s1_ptr + scale_at, row, F, D, GROUP, NVFP4, BLOCK_K)
        up = _rows_times(x_ptr, w3_ptr + at, s3_ptr + scale_at, row, F, D, GROUP, NVFP4, BLOCK_K)
        if NVFP4:
            gate *= tl.load(g_ptr + e)
            up *= tl.load(g_ptr + num_experts + e)
        gate = tl.where(gate > limit, limit, gate)  # keeps NaN
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(routing_ptr + pair)
        tl.store(hidden_ptr + pair * F + row, narrow(value, True), row < F)


@triton.jit
def _down_kernel(
    hidden_ptr, ids_ptr, w2_ptr, s2_ptr, g_ptr, partial_ptr, first_expert, num_experts,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[pair] = W2 hidden[pair]."""
    let_next_start()
    wait_for_previous()
    pair = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    e = (tl.load(ids_ptr + pair) - first_expert).to(tl.int64)
    if (e >= 0) & (e < num_experts):
        at, scale_at = e * D * (F // 2), e * D * (F // GROUP)
        y = _rows_times(
            hidden_ptr + pair * F, w2_ptr + at, s2_ptr + scale_at, row, D, F, GROUP, NVFP4, BLOCK_K
        )
        if NVFP4:
            y *= tl.load(g_ptr + 2 * num_experts + e)
        tl.store(partial_ptr + pair * D + row, y, row < D)


@triton.jit
def moe_routed_kernel(
    partial_ptr, ids_ptr, shared_ptr, out_ptr, first_expert, num_experts, TOP_K: tl.constexpr,
    D: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum of its partial rows in order of expert id, the shared expert last."""
    let_next_start()
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    before = -1
    for _ in range(TOP_K):
        best = num_experts * TOP_K
        for j in range(TOP_K):  # equal ids in the order of their slots
            e = tl.load(ids_ptr + token * TOP_K + j) - first_expert
            key = e * TOP_K + j
            is_next = (e >= 0) & (e < num_experts) & (key > before) & (key < best)
            best = tl.where(is_next, key, best)
        if best < num_experts * TOP_K:
            pair = token * TOP_K + best % TOP_K
            total += tl.load(partial_ptr + pair * D + d, d < D, 0.0)
        before = best
    if SHARED:
        total += widen(tl.load(shared_ptr + token * D + d, d < D, 0.0))
    tl.store(out_ptr + token * D + d, narrow(total, True), d < D)


def outputs(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result [T, D], and working memory: hidden [T K, F] and FP32 partial sums [T K, D]."""
    pairs, F = ids.numel(), w1.shape[1] * ROWS
    return (
        torch.empty_like(x),
        x.new_empty(pairs, F),
        x.new_empty(pairs, x.shape[1], dtype=torch.float32),
    )


def check(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str, out: tuple[Tensor, Tensor, Tensor],
) -> dict[str, int]:  # fmt: skip
    """Check the arguments that all kernels of the op share; -> the sizes T, K, D, F, E."""
    if format not in GROUPS:
        raise ValueError(f"format: expected one of {', '.join(GROUPS)}, got {format!r}")
    if not limit > 0:
        raise ValueError(f"limit: expected a positive number, got {limit}")
    check_int("first_expert", first_expert, 0)
    if (global_scale is None) != (format == "mxfp4"):
        want = "None" if format == "mxfp4" else "[3, E]"
        raise ValueError(f"global_scale: expected {want} for {format}, got {global_scale}")
    D, F = x.shape[-1], w1.shape[1] * ROWS
    if D % 128 or F % 128:
        raise ValueError(f"x, w1: expected multiples of 128 for D and F, got {D} and {F}")
    y, hidden, partial = out
    up, down = f"E {F // ROWS} {D // COLUMNS}", f"E {D // ROWS} {F // COLUMNS}"
    codes, scales = f"{ROWS} {COLUMNS // 2}", f"{ROWS} {COLUMNS // GROUPS[format]}"
    optional = {}
    if shared is not None:
        optional["shared"] = shared, "T D", torch.bfloat16
    if global_scale is not None:
        optional["global_scale"] = global_scale, "3 E", torch.float32
    sizes = check_tensors(
        x=(x, "T D", torch.bfloat16), ids=(ids, "T K", torch.int32),
        routing=(routing, "T K", torch.float32), w1=(w1, f"{up} {codes}", torch.uint8),
        s1=(s1, f"{up} {scales}", torch.uint8), w3=(w3, f"{up} {codes}", torch.uint8),
        s3=(s3, f"{up} {scales}", torch.uint8), w2=(w2, f"{down} {codes}", torch.uint8),
        s2=(s2, f"{down} {scales}", torch.uint8), y=(y, "T D", torch.bfloat16), **optional,
    )  # fmt: skip
    sizes["F"] = F
    check_tensors(
        hidden=(hidden, f"{ids.numel()} {F}", torch.bfloat16),
        partial=(partial, f"{ids.numel()} {D}", torch.float32),
    )
    return sizes


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill out[0]; out[1] and out[2] are working memory."""
    sizes = check(
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format,
        out,
    )  # fmt: skip
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    if T == 0:
        return
    y, hidden, partial = out
    meta = {"GROUP": GROUPS[format], "NVFP4": format == "nvfp4", "BLOCK_K": BLOCK_K} | CONFIG | PDL
    _gate_up_kernel[T * K, triton.cdiv(F, BLOCK_ROWS)](
        x, ids, routing, w1, s1, w3, s3, global_scale, hidden, limit, first_expert, E,
        TOP_K=K, D=D, F=F, BLOCK=BLOCK_ROWS, **meta,
    )  # fmt: skip
    _down_kernel[T * K, triton.cdiv(D, BLOCK_ROWS)](
        hidden, ids, w2, s2, global_scale, partial, first_expert, E,
        D=D, F=F, BLOCK=BLOCK_ROWS, **meta,
    )  # fmt: skip
    moe_routed_kernel[T, triton.cdiv(D, BLOCK_OUT)](
        partial, ids, shared, y, first_expert, E,
        TOP_K=K, D=D, SHARED=shared is not None, BLOCK=BLOCK_OUT, **CONFIG, **PDL,
    )  # fmt: skip


SPEC = KernelSpec("moe_routed/triton", launch, runs_on_cpu=triton.knobs.runtime.interpret)
