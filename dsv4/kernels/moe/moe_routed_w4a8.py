"""Routed experts on tokens rounded to FP8, MXFP4 weights: the grouped products in E4M3. Triton.

Built like moe_routed_grouped. Weights become E4M3: the largest scale of a row is left to the end,
and relative to it the others are part of the code, exactly if they are 2^-11 of it or more; weights
of smaller scales count as zero. The sum of 128 columns is multiplied by the token's scale before it
is added in FP32, as in the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import expert_lists
from dsv4.kernels.common.bits import e8m0_value, widen
from dsv4.kernels.common.experts import (
    STEP,
    TILE_ROWS,
    WORDS,
    largest_value,
    load_rows,
    multiply_fp8_step,
    ordered_fp8_steps,
    tiled,
)
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import fp8_rows, to_bf16
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe import moe_routed_grouped as grouped

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "moe_routed_w4a8_kernel", "outputs"]

REFERENCE = "dsv4.reference.experts:moe_routed_w4a8"
Config = Mapping[int, Mapping[str, int]]
# As moe_routed_grouped.CONFIG. 128 tokens do not fit: all sums, the sums of one step and the scales
# of the tokens would be 224 registers a thread.
CONFIG = {
    12: {"BM": 16, "BN": 64, "num_warps": 4, "STAGES": 5},
    24: {"BM": 32, "BN": 64, "num_warps": 4, "STAGES": 4},
    1 << 40: {"BM": 64, "BN": 64, "num_warps": 4, "STAGES": 3},
}
QUANTIZE_ROWS, LARGEST_ROWS = 16, 64

moe_routed_w4a8_kernel = grouped.moe_routed_kernel


@triton.jit
def moe_routed_w4a8_quantize_kernel(
    x_ptr, code_ptr, scale_ptr, N, K: tl.constexpr, ROWS: tl.constexpr, ORDER: tl.constexpr
):
    """E4M3 codes of [N, K], in the order of the product, and FP32 scales [N, K / 128]."""
    let_next_start()
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    at, live = row[:, None] * K + column[None, :], row < N
    code, scale = fp8_rows(widen(tl.load(x_ptr + at, live[:, None], 0.0)))
    code = ordered_fp8_steps(code, ROWS) if ORDER else code
    tl.store(code_ptr + at, code, live[:, None])
    at = row * (K // STEP) + tl.program_id(1)
    tl.store(scale_ptr + at, e8m0_value(scale.to(tl.int32)), live)


@triton.jit
def moe_routed_w4a8_largest_kernel(
    s_ptr, largest_ptr, N, SIZE: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr
):
    """The largest exponent byte of each row of MXFP4 scales, SIZE int32 of it in tiles -> [N]."""
    let_next_start()
    wait_for_previous()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, COUNT)[None, :]
    at = tiled(row.to(tl.int64)[:, None], SIZE, i, 1)
    word = tl.load(s_ptr + at, (i < SIZE) & (row < N)[:, None], 0)
    largest = tl.maximum(word & 255, (word >> 8) & 255)
    largest = tl.maximum(largest, tl.maximum((word >> 16) & 255, (word >> 24) & 255))
    tl.store(largest_ptr + row, tl.max(largest, axis=1), row < N)


@triton.jit
def native_step(w, scales, x, x_scale, acc, N: tl.constexpr, M: tl.constexpr):
    """As `multiply_fp8_step` by a matrix unit that takes FP4 and scales; nothing is in order."""
    byte = ((scales[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255).to(tl.uint8)
    exponent = (x_scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    exponent = tl.broadcast_to(exponent[:, None], [M, 4])
    return tl.dot_scaled(w, byte, "e2m1", tl.trans(x), exponent, "e4m3", acc)


@triton.jit
def _load_order(BN: tl.constexpr, NUM_WARPS: tl.constexpr, NATIVE: tl.constexpr):
    return tl.arange(0, BN) if NATIVE else load_rows(BN, NUM_WARPS)


@triton.jit
def _gate_up_tile(
    x_ptr, x_scale_ptr, x_scale_again_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr, most1_ptr,
    w3_ptr, s3_ptr, most3_ptr, hidden_ptr, limit, first, count, TOP_K: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """hidden = routing * silu(min(gate, limit)) * clamp(up) of BN features and `count` tokens.

    x_scale_again_ptr  x_scale_ptr: Triton 3.6 compiles no two scaled products that share a scale
    """
    CODES: tl.constexpr = STEP // 2 if NATIVE else WORDS  # bytes, or words
    TILE: tl.constexpr = TILE_ROWS * CODES
    m, i, k = tl.arange(0, BM), tl.arange(0, CODES), tl.arange(0, STEP)
    pair = tl.load(rows_ptr + first + tl.minimum(m, count - 1))  # past the end: the last again
    token = (pair // TOP_K).to(tl.int64)
    feature = tl.program_id(0) * BN + tl.arange(0, BN)
    loaded = tl.program_id(0) * BN + _load_order(BN, NUM_WARPS, NATIVE)
    x_at, x_scale_at = x_ptr + token[:, None] * D + k[None, :], x_scale_ptr + token * (D // STEP)
    w_at = tiled(loaded, D // STEP * CODES, 0, CODES)[:, None] + i[None, :]
    s_at = tiled(loaded, D // STEP, 0, 1)
    w1_at, w3_at, s1_at, s3_at = w1_ptr + w_at, w3_ptr + w_at, s1_ptr + s_at, s3_ptr + s_at
    x_scale_again_at = x_scale_again_ptr + token * (D // STEP)
    if not NATIVE:
        most1, most3 = tl.load(most1_ptr + loaded), tl.load(most3_ptr + loaded)
    gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, D // STEP, num_stages=STAGES):
        x, x_scale = tl.load(x_at + step * STEP), tl.load(x_scale_at + step)
        w1, w3 = tl.load(w1_at + step * TILE), tl.load(w3_at + step * TILE)
        s1, s3 = tl.load(s1_at + step * TILE_ROWS), tl.load(s3_at + step * TILE_ROWS)
        if NATIVE:
            again = tl.load(x_scale_again_at + step)
            gate = native_step(w1, s1, x, x_scale, gate, BN, BM)
            up = native_step(w3, s3, x, again, up, BN, BM)
        else:
            gate = multiply_fp8_step(w1, s1, most1, x, x_scale, gate, BN, BM, NUM_WARPS)
            up = multiply_fp8_step(w3, s3, most3, x, x_scale, up, BN, BM, NUM_WARPS)
    if not NATIVE:
        gate *= largest_value(tl.load(most1_ptr + feature))[:, None]
        up *= largest_value(tl.load(most3_ptr + feature))[:, None]
    gate = tl.where(gate > limit, limit, gate)  # keeps NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(routing_ptr + pair)[None, :]
    at = (first + m).to(tl.int64)[None, :] * F + feature[:, None]
    tl.store(hidden_ptr + at, to_bf16(value), (m < count)[None, :])


@triton.jit
def moe_routed_w4a8_gate_up_kernel(
    x_ptr, x_scale_ptr, x_scale_again_ptr, rows_ptr, offsets_ptr, block_expert_ptr,
    block_start_ptr, num_blocks_ptr, routing_ptr, w1_ptr, s1_ptr, most1_ptr, w3_ptr, s3_ptr,
    most3_ptr, hidden_ptr, limit, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BM: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """hidden[place], a row for each sorted pair, BF16."""
    let_next_start()
    wait_for_previous()
    block = tl.program_id(1)
    if block < tl.load(num_blocks_ptr):
        e, first = tl.load(block_expert_ptr + block), tl.load(block_start_ptr + block)
        count = tl.minimum(tl.load(offsets_ptr + e + 1) - first, BM)
        codes = e.to(tl.int64) * F * (D // 2 if NATIVE else D // 8)
        w1_ptr += codes
        w3_ptr += codes
        s1_ptr += e.to(tl.int64) * F * (D // STEP)
        s3_ptr += e.to(tl.int64) * F * (D // STEP)
        most1_ptr += e * F
        most3_ptr += e * F
        if count > TAIL:
            _gate_up_tile(
                x_ptr, x_scale_ptr, x_scale_again_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr,
                most1_ptr, w3_ptr, s3_ptr, most3_ptr, hidden_ptr, limit, first, count, TOP_K, D, F,
                BM, BN, NUM_WARPS, STAGES, NATIVE,
            )  # fmt: skip
        elif TAIL:
            _gate_up_tile(
                x_ptr, x_scale_ptr, x_scale_again_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr,
                most1_ptr, w3_ptr, s3_ptr, most3_ptr, hidden_ptr, limit, first, count, TOP_K, D, F,
                TAIL, BN, NUM_WARPS, STAGES, NATIVE,
            )  # fmt: skip


@triton.jit
def _down_tile(
    h_ptr, h_scale_ptr, rows_ptr, w2_ptr, s2_ptr, most2_ptr, partial_ptr, first, count,
    D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """partial[pair] = W2 hidden[place], BN outputs of `count` tokens."""
    CODES: tl.constexpr = STEP // 2 if NATIVE else WORDS  # bytes, or words
    TILE: tl.constexpr = TILE_ROWS * CODES
    m, i, k = tl.arange(0, BM), tl.arange(0, CODES), tl.arange(0, STEP)
    place = (first + tl.minimum(m, count - 1)).to(tl.int64)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    loaded = tl.program_id(0) * BN + _load_order(BN, NUM_WARPS, NATIVE)
    h_at, h_scale_at = h_ptr + place[:, None] * F + k[None, :], h_scale_ptr + place * (F // STEP)
    w_at = w2_ptr + tiled(loaded, F // STEP * CODES, 0, CODES)[:, None] + i[None, :]
    s_at = s2_ptr + tiled(loaded, F // STEP, 0, 1)
    if not NATIVE:
        most = tl.load(most2_ptr + loaded)
    y = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, F // STEP, num_stages=STAGES):
        h, h_scale = tl.load(h_at + step * STEP), tl.load(h_scale_at + step)
        w, s = tl.load(w_at + step * TILE), tl.load(s_at + step * TILE_ROWS)
        if NATIVE:
            y = native_step(w, s, h, h_scale, y, BN, BM)
        else:
            y = multiply_fp8_step(w, s, most, h, h_scale, y, BN, BM, NUM_WARPS)
    if not NATIVE:
        y *= largest_value(tl.load(most2_ptr + row))[:, None]
    pair = tl.load(rows_ptr + place).to(tl.int64)
    tl.store(partial_ptr + pair[None, :] * D + row[:, None], y, (m < count)[None, :])


@triton.jit
def moe_routed_w4a8_down_kernel(
    h_ptr, h_scale_ptr, rows_ptr, offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr,
    w2_ptr, s2_ptr, most2_ptr, partial_ptr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """partial[pair], FP32."""
    let_next_start()
    wait_for_previous()
    block = tl.program_id(1)
    if block < tl.load(num_blocks_ptr):
        e, first = tl.load(block_expert_ptr + block), tl.load(block_start_ptr + block)
        count = tl.minimum(tl.load(offsets_ptr + e + 1) - first, BM)
        w2_ptr += e.to(tl.int64) * D * (F // 2 if NATIVE else F // 8)
        s2_ptr += e.to(tl.int64) * D * (F // STEP)
        most2_ptr += e * D
        if count > TAIL:
            _down_tile(
                h_ptr, h_scale_ptr, rows_ptr, w2_ptr, s2_ptr, most2_ptr, partial_ptr, first, count,
                D, F, BM, BN, NUM_WARPS, STAGES, NATIVE,
            )  # fmt: skip
        elif TAIL:
            _down_tile(
                h_ptr, h_scale_ptr, rows_ptr, w2_ptr, s2_ptr, most2_ptr, partial_ptr, first, count,
                D, F, TAIL, BN, NUM_WARPS, STAGES, NATIVE,
            )  # fmt: skip


def working_memory(args: tuple[Any, ...], config: Config) -> tuple[Tensor, ...]:
    """The result, hidden, partial sums, both inputs in FP8, largest scales of rows, and lists."""
    x, ids, _, w1, *_, shared, limit, first_expert = args
    base = portable.outputs(*args[:9], None, shared, limit, first_expert, "mxfp4")
    (T, D), E, pairs = x.shape, w1.shape[0], ids.numel()
    F = base[1].shape[1]
    block = grouped.tile(pairs, E, D, F, config)["BM"]
    return (
        *base,
        x.new_empty(T, D, dtype=torch.float8_e4m3fn),
        x.new_empty(T, D // 128, dtype=torch.float32),
        x.new_empty(pairs, F, dtype=torch.float8_e4m3fn),
        x.new_empty(pairs, F // 128, dtype=torch.float32),
        *(ids.new_empty(E, rows) for rows in (F, F, D)),
        *expert_lists.outputs(ids, first_expert, E, block),
    )


def run(args: tuple[Any, ...], out: tuple[Tensor, ...], config: Config, is_native: bool) -> None:
    """Fill out[0]; args are those of the op."""
    x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert = args
    y, hidden, partial, x8, x_scale, h8, h_scale, most1, most3, most2, *lists = out
    sizes = portable.check(*args[:9], None, *args[9:], "mxfp4", (y, hidden, partial))
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    check_tensors(
        x8=(x8, f"{T} {D}", torch.float8_e4m3fn),
        x_scale=(x_scale, f"{T} {D // 128}", torch.float32),
        h8=(h8, f"{T * K} {F}", torch.float8_e4m3fn),
        h_scale=(h_scale, f"{T * K} {F // 128}", torch.float32),
        most1=(most1, f"{E} {F}", torch.int32), most3=(most3, f"{E} {F}", torch.int32),
        most2=(most2, f"{E} {D}", torch.int32),
    )  # fmt: skip
    if T == 0:
        return
    t = grouped.tile(T * K, E, D, F, config)
    BM, BN = t["BM"], t["BN"]
    expert_lists.launch(ids, first_expert, E, BM, tuple(lists))
    meta = {
        "D": D, "F": F, "BM": BM, "TAIL": BM // 2 if BM > grouped.MIN_BM else 0,
        "NUM_WARPS": t["num_warps"], "STAGES": t["STAGES"], "NATIVE": is_native,
        "num_warps": t["num_warps"], **PDL,
    }  # fmt: skip
    _quantize(x, x8, x_scale, not is_native)
    s1, s3, s2 = (s.view(torch.int32) for s in (s1, s3, s2))
    if not is_native:
        w1, w3, w2 = (w.view(torch.int32) for w in (w1, w3, w2))
        for s, largest in ((s1, most1), (s3, most3), (s2, most2)):
            _largest(s, largest)
    moe_routed_w4a8_gate_up_kernel[F // BN, len(lists[2])](
        x8, x_scale, x_scale, *lists[:5], routing, w1, s1, most1, w3, s3, most3, hidden,
        float(limit), TOP_K=K, BN=BN, **meta,
    )  # fmt: skip
    _quantize(hidden, h8, h_scale, not is_native)
    moe_routed_w4a8_down_kernel[D // (2 * BN), len(lists[2])](
        h8, h_scale, *lists[:5], w2, s2, most2, partial, BN=2 * BN, **meta
    )
    grouped.combine(partial, ids, shared, y, first_expert, E)


def _largest(s: Tensor, largest: Tensor) -> None:
    N, words = largest.numel(), s.shape[2]  # a word a step: 128 columns
    moe_routed_w4a8_largest_kernel[(triton.cdiv(N, LARGEST_ROWS),)](
        s, largest, N, SIZE=words, COUNT=triton.next_power_of_2(words), ROWS=LARGEST_ROWS,
        num_warps=4, **PDL,
    )  # fmt: skip


def _quantize(x: Tensor, code: Tensor, scale: Tensor, is_ordered: bool) -> None:
    N, K = x.shape
    moe_routed_w4a8_quantize_kernel[triton.cdiv(N, QUANTIZE_ROWS), K // 128](
        x, code.view(torch.uint8), scale, N, K=K, ROWS=QUANTIZE_ROWS, ORDER=is_ordered,
        num_warps=4, **EXACT, **PDL,
    )  # fmt: skip


def outputs(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The result [T, D] and working memory."""
    args = x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert
    return working_memory(args, CONFIG)


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill out[0]; the rest is working memory."""
    args = x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert
    run(args, out, CONFIG, is_native=False)


PRODUCTS = ("moe_routed_w4a8_gate_up_kernel", "moe_routed_w4a8_down_kernel")


def tensor_core(arch: int, args: dict[str, object]) -> str:
    """The instruction that the compiled products must hold."""
    return r"wgmma\.mma_async\S*\.e4m3\.e4m3"


SPEC = KernelSpec("moe_routed_w4a8/triton", launch, arch=(9,), runs_on_cpu=INTERPRETED)
