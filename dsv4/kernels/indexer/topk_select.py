"""Top k of each row of scores: one program a block of 8192, then one a row over their winners.

A row of up to 8192 scores (32K tokens of context) takes one pass. Longer rows keep the k best of
each block, in order of place, and choose among those: exact, because the k best of a row are among
the k best of its blocks. Triton, any SM from 9.0 (programmatic dependent launch).
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
from dsv4.kernels.common.topk import DEAD, order_key, topk_bracket, topk_places

REFERENCE = "dsv4.reference.paged_indexer:topk_select"
CONFIG = {"BLOCK": 8192, "MERGE": 32768, "KEYS_PER_WARP": 512}


@triton.jit
def topk_select_kernel(
    scores_ptr, lengths_ptr, out_ptr, keys_ptr, ids_ptr, S, num_blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + t), 0), S).to(tl.int32)
    if length <= K:
        if block == 0:
            j = tl.arange(0, BLOCK_K)
            tl.store(out_ptr + t * K + j, tl.where(j < length, j, -1), j < K)
    elif block * BLOCK < length:
        i = tl.arange(0, BLOCK)
        num_live = tl.minimum(length - block * BLOCK, BLOCK)
        k = tl.minimum(num_live, K)
        score = tl.load(scores_ptr + t * S + block * BLOCK + i, i < num_live, 0.0)
        key = tl.where(i < num_live, order_key(score), DEAD)
        low, high, room = topk_bracket(key, num_live, k)
        is_chosen, place = topk_places(key, low, high, room)
        tl.device_assert(tl.sum(is_chosen.to(tl.int32), axis=0) == k, "entries lost")
        if length <= BLOCK:
            tl.store(out_ptr + t * K + place, i, is_chosen)
        else:
            at = (t * num_blocks + block) * K + place
            tl.store(keys_ptr + at, key, is_chosen)
            tl.store(ids_ptr + at, block * BLOCK + i, is_chosen)


@triton.jit
def topk_merge_kernel(
    lengths_ptr, out_ptr, keys_ptr, ids_ptr, S, num_blocks,
    K: tl.constexpr, BLOCK: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + t), S).to(tl.int32)
    if length > BLOCK:
        i = tl.arange(0, MERGE)
        block = i // K
        is_live = i - block * K < length - block * BLOCK
        at = t * num_blocks * K + i
        key = tl.load(keys_ptr + at, is_live, DEAD)
        last = length // BLOCK
        num_live = last * K + tl.minimum(length - last * BLOCK, K)
        low, high, room = topk_bracket(key, num_live, tl.zeros_like(length) + K)
        is_chosen, place = topk_places(key, low, high, room)
        tl.device_assert(tl.sum(is_chosen.to(tl.int32), axis=0) == K, "entries lost")
        id = tl.load(ids_ptr + at, is_chosen, 0)
        tl.store(out_ptr + t * K + place, id, is_chosen)


def outputs(scores: Tensor, lengths: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the places [T, topk], then room for keys and places of the winners of blocks."""
    T, S = scores.shape
    winners = winner_shape(T, S, topk)
    return (
        scores.new_empty((T, topk), dtype=torch.int32),
        scores.new_empty(winners, dtype=torch.int32),
        scores.new_empty(winners, dtype=torch.int32),
    )


def block_size(S: int, topk: int) -> int:
    """Scores a program takes: CONFIG's, unless the row is shorter or the merge would not fit."""
    block = min(CONFIG["BLOCK"], max(triton.next_power_of_2(S), 16))
    block = max(block, triton.next_power_of_2(topk))
    while triton.cdiv(S, block) > 1 and triton.cdiv(S, block) * topk > CONFIG["MERGE"]:
        block *= 2
    if block > CONFIG["MERGE"]:
        raise ValueError(f"topk: expected room to merge it for {S} scores a row, got {topk}")
    return block


def winner_shape(T: int, S: int, topk: int) -> tuple[int, int, int]:
    """Rows, blocks and winners of a block; no blocks where one pass is enough."""
    num_blocks = triton.cdiv(S, block_size(S, topk)) if topk < S else 1
    return T, num_blocks if num_blocks > 1 else 0, topk


def launch_select(
    scores: Tensor, lengths: Tensor, topk: int, out: Tensor, keys: Tensor, ids: Tensor,
    is_first: bool,
) -> None:  # fmt: skip
    """Start the kernels on checked tensors; `is_first` if no kernel of the op came before."""
    T, S = scores.shape
    block = block_size(S, topk) if topk < S else 16
    num_blocks = triton.cdiv(S, block) if topk < S else 1
    topk_select_kernel[(T, num_blocks)](
        scores, lengths, out, keys, ids, S, num_blocks, K=topk,
        BLOCK_K=triton.next_power_of_2(topk), BLOCK=block, num_warps=_num_warps(block),
        **({} if is_first else PDL),
    )  # fmt: skip
    if num_blocks > 1:
        merge = triton.next_power_of_2(num_blocks * topk)
        topk_merge_kernel[(T,)](
            lengths, out, keys, ids, S, num_blocks, K=topk, BLOCK=block, MERGE=merge,
            num_warps=_num_warps(merge), **PDL,
        )  # fmt: skip


def _num_warps(num_keys: int) -> int:
    return min(max(num_keys // CONFIG["KEYS_PER_WARP"], 4), 32)


def check(
    scores: Tensor, lengths: Tensor, topk: int, out: tuple[Tensor, Tensor, Tensor]
) -> bool:  # fmt: skip
    """Check the arguments; -> whether there are rows."""
    check_int("topk", topk)
    places, keys, ids = out
    sizes = check_tensors(
        scores=(scores, "T S", torch.float32),
        lengths=(lengths, "T", torch.int64),
        places=(places, f"T {topk}", torch.int32),
        keys=(keys, f"T blocks {topk}", torch.int32),
        ids=(ids, f"T blocks {topk}", torch.int32),
    )
    return sizes["T"] > 0


def launch(
    scores: Tensor, lengths: Tensor, topk: int, out: tuple[Tensor, Tensor, Tensor]
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    if check(scores, lengths, topk, out):
        launch_select(scores, lengths, topk, *out, is_first=True)


SPEC = KernelSpec("topk_select/triton", launch, runs_on_cpu=INTERPRETED)
