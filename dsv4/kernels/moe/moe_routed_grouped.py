"""Routed experts of many tokens: products grouped by expert on the matrix units. Triton, SM 9 on.

Tokens are sorted by expert without a word to the host, and a program multiplies one block of an
expert's tokens with one tile of its weight rows. The codes are decoded in registers and go from
there to the matrix unit; columns of tokens are permuted once to match, so nothing is exchanged
between threads. Every output is one FP32 sum in the order of columns, whatever the size
of the block, so a token gets the same bits alone and among many. The sum over a token's experts
goes in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import expert_lists
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.experts import (
    STEP,
    TILE_ROWS,
    UNSCALE,
    WORDS,
    load_rows,
    multiply_step,
    ordered_steps,
    step_order,
    tiled,
)
from dsv4.kernels.common.fragments import end_step
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import to_bf16
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe.moe_routed import GROUPS, REFERENCE

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "moe_routed_kernel", "outputs"]

# Up to so many pairs an expert -> tile: BM tokens, or half as many in an expert's last block if
# they do; BN rows of gate and of up each, twice as many of down.
CONFIG = {
    12: {"BM": 16, "BN": 64, "num_warps": 4, "STAGES": 5},
    24: {"BM": 32, "BN": 64, "num_warps": 4, "STAGES": 4},
    96: {"BM": 64, "BN": 128, "num_warps": 8, "STAGES": 4},
    1 << 40: {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 4},
}
MIN_BM = 16
TILE = tl.constexpr(TILE_ROWS * WORDS)  # words
PERMUTE_ROWS, COMBINE = 16, 1024


@triton.jit(do_not_specialize=["T"])
def moe_routed_permute_kernel(x_ptr, out_ptr, T, D: tl.constexpr, ROWS: tl.constexpr):
    """Columns of the tokens in the order of `multiply_step`."""
    let_next_start()
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    at, live = row[:, None] * D + column[None, :], (row < T)[:, None]
    tl.store(out_ptr + at, ordered_steps(tl.load(x_ptr + at, live, 0.0), ROWS), live)


@triton.jit
def _gate_up_tile(
    x_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, hidden_ptr, limit, gate_scale,
    up_scale, first, count, TOP_K: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    GROUP: tl.constexpr, NVFP4: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden = routing * silu(min(gate, limit)) * clamp(up) of BN features and `count` tokens."""
    m, i, k = tl.arange(0, BM), tl.arange(0, WORDS), tl.arange(0, STEP)
    pair = tl.load(rows_ptr + first + tl.minimum(m, count - 1))  # past the end: the last again
    base = tl.program_id(0) * BN
    position = base + load_rows(BN, NUM_WARPS)
    feature = position // STEP * STEP + step_order(position % STEP)
    x_at = x_ptr + (pair // TOP_K).to(tl.int64)[:, None] * D + k[None, :]
    w_at = tiled(feature, D // 8, 0, WORDS)[:, None] + i[None, :]
    s_at = tiled(feature, D // STEP, 0, 1)
    w1_at, w3_at, s1_at, s3_at = w1_ptr + w_at, w3_ptr + w_at, s1_ptr + s_at, s3_ptr + s_at
    gate, up = tl.zeros([BN, BM], tl.float32), tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, D // STEP, num_stages=STAGES):
        x = tl.load(x_at + step * STEP)
        w1, w3 = tl.load(w1_at + step * TILE), tl.load(w3_at + step * TILE)
        s1, s3 = tl.load(s1_at + step * TILE_ROWS), tl.load(s3_at + step * TILE_ROWS)
        gate = multiply_step(w1, s1, x, gate, BN, GROUP, NVFP4, NUM_WARPS)
        up = multiply_step(w3, s3, x, up, BN, GROUP, NVFP4, NUM_WARPS)
        end_step(step)
    gate, up = gate * gate_scale, up * up_scale
    gate = tl.where(gate > limit, limit, gate)  # keeps NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(routing_ptr + pair)[None, :]
    at = (first + m).to(tl.int64)[None, :] * F + (base + tl.arange(0, BN))[:, None]
    tl.store(hidden_ptr + at, to_bf16(value), (m < count)[None, :])


@triton.jit
def moe_routed_gate_up_kernel(
    x_ptr, rows_ptr, offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, routing_ptr,
    w1_ptr, s1_ptr, w3_ptr, s3_ptr, g_ptr, hidden_ptr, limit, num_experts, TOP_K: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr, BM: tl.constexpr,
    TAIL: tl.constexpr, BN: tl.constexpr, NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden[place], a row for each sorted pair, its features in the order of `multiply_step`."""
    let_next_start()
    wait_for_previous()
    block = tl.program_id(1)
    if block < tl.load(num_blocks_ptr):
        e, first = tl.load(block_expert_ptr + block), tl.load(block_start_ptr + block)
        count = tl.minimum(tl.load(offsets_ptr + e + 1) - first, BM)
        at, scale_at = e.to(tl.int64) * F * (D // 8), e.to(tl.int64) * F * (D // STEP)
        gate_scale, up_scale = UNSCALE, UNSCALE
        if NVFP4:
            gate_scale *= tl.load(g_ptr + e)
            up_scale *= tl.load(g_ptr + num_experts + e)
        w1_ptr += at
        w3_ptr += at
        s1_ptr += scale_at
        s3_ptr += scale_at
        if count > TAIL:
            _gate_up_tile(
                x_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, hidden_ptr, limit,
                gate_scale, up_scale, first, count, TOP_K, D, F, GROUP, NVFP4, BM, BN, NUM_WARPS,
                STAGES,
            )  # fmt: skip
        elif TAIL:
            _gate_up_tile(
                x_ptr, rows_ptr, routing_ptr, w1_ptr, s1_ptr, w3_ptr, s3_ptr, hidden_ptr, limit,
                gate_scale, up_scale, first, count, TOP_K, D, F, GROUP, NVFP4, TAIL, BN, NUM_WARPS,
                STAGES,
            )  # fmt: skip


@triton.jit
def _down_tile(
    hidden_ptr, rows_ptr, w2_ptr, s2_ptr, partial_ptr, scale, first, count, D: tl.constexpr,
    F: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[pair] = W2 hidden[place], BN outputs of `count` tokens."""
    m, i, k = tl.arange(0, BM), tl.arange(0, WORDS), tl.arange(0, STEP)
    place = first + tl.minimum(m, count - 1)
    base = tl.program_id(0) * BN
    row = base + load_rows(BN, NUM_WARPS)
    h_at = hidden_ptr + place.to(tl.int64)[:, None] * F + k[None, :]
    w_at = w2_ptr + tiled(row, F // 8, 0, WORDS)[:, None] + i[None, :]
    s_at = s2_ptr + tiled(row, F // STEP, 0, 1)
    y = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(0, F // STEP, num_stages=STAGES):
        h = tl.load(h_at + step * STEP)
        w, s = tl.load(w_at + step * TILE), tl.load(s_at + step * TILE_ROWS)
        y = multiply_step(w, s, h, y, BN, GROUP, NVFP4, NUM_WARPS)
        end_step(step)
    pair = tl.load(rows_ptr + place).to(tl.int64)
    at = pair[None, :] * D + (base + tl.arange(0, BN))[:, None]
    tl.store(partial_ptr + at, y * scale, (m < count)[None, :])


@triton.jit
def moe_routed_down_kernel(
    hidden_ptr, rows_ptr, offsets_ptr, block_expert_ptr, block_start_ptr, num_blocks_ptr, w2_ptr,
    s2_ptr, g_ptr, partial_ptr, num_experts, D: tl.constexpr, F: tl.constexpr,
    GROUP: tl.constexpr, NVFP4: tl.constexpr, BM: tl.constexpr, TAIL: tl.constexpr,
    BN: tl.constexpr, NUM_WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[pair], FP32."""
    let_next_start()
    wait_for_previous()
    block = tl.program_id(1)
    if block < tl.load(num_blocks_ptr):
        e, first = tl.load(block_expert_ptr + block), tl.load(block_start_ptr + block)
        count = tl.minimum(tl.load(offsets_ptr + e + 1) - first, BM)
        w2_ptr += e.to(tl.int64) * D * (F // 8)
        s2_ptr += e.to(tl.int64) * D * (F // STEP)
        scale = UNSCALE
        if NVFP4:
            scale *= tl.load(g_ptr + 2 * num_experts + e)
        if count > TAIL:
            _down_tile(
                hidden_ptr, rows_ptr, w2_ptr, s2_ptr, partial_ptr, scale, first, count, D, F,
                GROUP, NVFP4, BM, BN, NUM_WARPS, STAGES,
            )  # fmt: skip
        elif TAIL:
            _down_tile(
                hidden_ptr, rows_ptr, w2_ptr, s2_ptr, partial_ptr, scale, first, count, D, F,
                GROUP, NVFP4, TAIL, BN, NUM_WARPS, STAGES,
            )  # fmt: skip


@triton.jit
def moe_routed_kernel(
    partial_ptr, ids_ptr, shared_ptr, out_ptr, first_expert, num_experts, TOP_K: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[token] = the sum of its partial rows in order of expert id, the shared expert last."""
    let_next_start()
    wait_for_previous()
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, SLOTS)
    e = tl.load(ids_ptr + token * TOP_K + j, j < TOP_K, -1) - first_expert
    here = (j < TOP_K) & (e >= 0) & (e < num_experts)
    key = tl.where(here, e * SLOTS + j, num_experts * SLOTS + j)  # equal ids by their slots
    rank = tl.sum((key[None, :] < key[:, None]).to(tl.int32), axis=1)
    count = tl.sum(here.to(tl.int32), axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(0, TOP_K):
        pair = token * TOP_K + tl.sum(tl.where(rank == r, j, 0), axis=0)
        total += tl.load(partial_ptr + pair * D + d, d < tl.where(count > r, D, 0), 0.0)
    if SHARED:
        total += widen(tl.load(shared_ptr + token * D + d, d < D, 0.0))
    tl.store(out_ptr + token * D + d, to_bf16(total), d < D)


def outputs(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The result and working memory of the portable kernel, x in order, and the routing lists."""
    base = portable.outputs(
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format
    )
    F = base[1].shape[1]
    block = tile(ids.numel(), w1.shape[0], x.shape[1], F, CONFIG)["BM"]
    lists = expert_lists.outputs(ids, first_expert, w1.shape[0], block)
    return (*base, torch.empty_like(x), *lists)


def combine(
    partial: Tensor, ids: Tensor, shared: Tensor | None, y: Tensor, first_expert: int,
    num_experts: int,
) -> None:  # fmt: skip
    """Launch the sum over the experts of a token."""
    (T, K), D = ids.shape, y.shape[1]
    moe_routed_kernel[T, triton.cdiv(D, COMBINE)](
        partial, ids, shared, y, first_expert, num_experts, TOP_K=K,
        SLOTS=triton.next_power_of_2(K), D=D, SHARED=shared is not None, BLOCK=COMBINE, num_warps=4,
        **PDL,
    )  # fmt: skip


def tile(
    pairs: int, num_experts: int, D: int, F: int, config: Mapping[int, Mapping[str, int]]
) -> dict[str, int]:
    """The tile of `config`, its rows narrowed until they divide D and F."""
    found = next(dict(t) for most, t in config.items() if most * num_experts >= pairs)
    while F % found["BN"] or D % (2 * found["BN"]):
        found["BN"] //= 2
        found["num_warps"] //= 2
    return found


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill out[0]; the rest is working memory.

    Scales of MXFP4 must be within 2^-64 and 2^65, which `dsv4.ops.moe.stack_experts` sees to.
    """
    y, hidden, partial, ordered, *lists = out
    sizes = portable.check(
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format,
        (y, hidden, partial),
    )  # fmt: skip
    T, K, D, F, E = (sizes[c] for c in "TKDFE")
    check_tensors(ordered=(ordered, f"{T} {D}", torch.bfloat16))
    if T == 0:
        return
    t = tile(T * K, E, D, F, CONFIG)
    BM, BN = t["BM"], t["BN"]
    expert_lists.launch(ids, first_expert, E, BM, tuple(lists))
    moe_routed_permute_kernel[triton.cdiv(T, PERMUTE_ROWS), D // 128](
        x, ordered, T, D=D, ROWS=PERMUTE_ROWS, num_warps=4, **PDL
    )
    rows, offsets, block_expert, block_start, num_blocks, _ = lists
    where = rows, offsets, block_expert, block_start, num_blocks
    w1, w3, w2 = (w.view(torch.int32) for w in (w1, w3, w2))
    words = torch.int32 if format == "mxfp4" else torch.int64  # the scales of 128 columns
    meta = {
        "D": D, "F": F, "GROUP": GROUPS[format], "NVFP4": format == "nvfp4", "BM": BM,
        "TAIL": BM // 2 if BM > MIN_BM else 0, "NUM_WARPS": t["num_warps"], "STAGES": t["STAGES"],
        "num_warps": t["num_warps"], **PDL,
    }  # fmt: skip
    moe_routed_gate_up_kernel[F // BN, len(block_expert)](
        ordered, *where, routing, w1, s1.view(words), w3, s3.view(words), global_scale, hidden,
        float(limit), E, TOP_K=K, BN=BN, **meta,
    )  # fmt: skip
    moe_routed_down_kernel[D // (2 * BN), len(block_expert)](
        hidden, *where, w2, s2.view(words), global_scale, partial, E, BN=2 * BN, **meta
    )
    combine(partial, ids, shared, y, first_expert, E)


PRODUCTS = ("moe_routed_gate_up_kernel", "moe_routed_down_kernel")


def tensor_core(arch: int, args: dict[str, object]) -> str | None:
    """The instruction that the compiled products must hold."""
    return r"wgmma\.mma_async" if arch == 90 else r"tcgen05\.mma"


SPEC = KernelSpec("moe_routed/grouped", launch, arch=(9, 10), runs_on_cpu=INTERPRETED)
