"""Affinity, biased top-k, weights: a warp a token, all experts in registers. Triton, SM 9 on.

The choice is k rounds of the largest score and the least id that has it, both as 32-bit integers,
which a warp reduces in one instruction. 8192 tokens take 9 us, with four a program 13 us (H200).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_int
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.routing import affinity, choice_weights

REFERENCE = "dsv4.reference.routing:router_topk"
CONFIG = {"BLOCK_T": 1, "num_warps": 1, "enable_fp_fusion": True}

LARGEST = tl.constexpr(0x7FFFFFFF)
LEAST = tl.constexpr(-0x80000000)  # of no number, as a NaN with these bits counts as LARGEST


@triton.jit(do_not_specialize=["T"])
def router_topk_kernel(
    logits_ptr, bias_ptr, padding_ptr, ids_ptr, weights_ptr, T, scaling,
    E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    e, kk = tl.arange(0, BLOCK_E)[None, :], tl.arange(0, BLOCK_K)[None, :]
    is_row, is_expert = t < T, e < E
    bias = tl.load(bias_ptr + e, is_expert, 0.0)
    wait_for_previous()
    let_next_start()  # not before: moe_with_shared reads what was written ahead of the logits
    is_token = is_row
    if padding_ptr is not None:
        is_token = is_row & (tl.load(padding_ptr + t, is_row, 1) == 0)
    logits = tl.load(logits_ptr + t * E + e, is_row & is_expert, 0.0)
    biased = affinity(logits) + bias
    # Floats compare as integers once the magnitude bits of negative ones are flipped.
    bits = biased.to(tl.int32, bitcast=True)
    order = tl.where(biased == biased, bits ^ ((bits >> 31) & LARGEST), LARGEST)
    order = tl.where(is_expert, order, LEAST)
    ids = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for i in tl.static_range(K):
        best = tl.max(order, axis=1)[:, None]
        first = tl.min(tl.where(order == best, e, BLOCK_E), axis=1)[:, None]
        order = tl.where(e == first, LEAST, order)
        ids = tl.where(kk == i, first, ids)
    is_live = is_token & (kk < K)
    weights = choice_weights(logits_ptr + t * E, ids, is_live, scaling, E)
    tl.store(ids_ptr + t * K + kk, tl.where(is_live, ids, -1), is_row & (kk < K))
    tl.store(weights_ptr + t * K + kk, weights, is_row & (kk < K))


def outputs(
    logits: Tensor, bias: Tensor, k: int, scaling: float, is_padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Allocate ids [T, k] int32 and weights [T, k] FP32. Doubles as the op's fake."""
    T = logits.shape[0]
    return logits.new_empty((T, k), dtype=torch.int32), logits.new_empty((T, k))


def launch(
    logits: Tensor, bias: Tensor, k: int, scaling: float, is_padding: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    ids, weights = out
    check_int("k", k)
    given = {} if is_padding is None else {"is_padding": (is_padding, "T", torch.bool)}
    sizes = check_tensors(
        logits=(logits, "T E", torch.float32),
        bias=(bias, "E", torch.float32),
        ids=(ids, f"T {k}", torch.int32),
        weights=(weights, f"T {k}", torch.float32),
        **given,
    )
    T, E = sizes["T"], sizes["E"]
    if k > E:
        raise ValueError(f"k: expected at most {E} experts, got {k}")
    if T == 0:
        return
    router_topk_kernel[(triton.cdiv(T, CONFIG["BLOCK_T"]),)](
        logits, bias, is_padding, ids, weights, T, scaling, E=E, K=k,
        BLOCK_E=triton.next_power_of_2(E), BLOCK_K=triton.next_power_of_2(k), **CONFIG, **PDL,
    )  # fmt: skip


SPEC = KernelSpec("router_topk/triton", launch, runs_on_cpu=INTERPRETED)
