"""Experts from the token's id, weights from its logits: reads K logits a token. Triton, SM 9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.routing import choice_weights

REFERENCE = "dsv4.reference.routing:router_hash"
CONFIG = {"BLOCK_T": 16, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["T"])
def router_hash_kernel(
    logits_ptr, tid2eid_ptr, token_ptr, ids_ptr, weights_ptr, T, V, scaling,
    E: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_previous()
    let_next_start()  # not before: moe_with_shared reads what was written ahead of the logits
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    kk = tl.arange(0, BLOCK_K)[None, :]
    is_row = (t < T) & (kk < K)
    token = tl.load(token_ptr + t, t < T, -1)
    is_live = is_row & (token >= 0) & (token < V)
    ids = tl.load(tid2eid_ptr + token * K + kk, is_live, -1).to(tl.int32)
    weights = choice_weights(logits_ptr + t * E, ids, is_live, scaling, E)
    tl.store(ids_ptr + t * K + kk, ids, is_row)
    tl.store(weights_ptr + t * K + kk, weights, is_row)


def outputs(
    logits: Tensor, tid2eid: Tensor, token_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Allocate ids [T, K] int32 and weights [T, K] FP32. Doubles as the op's fake."""
    shape = logits.shape[0], tid2eid.shape[1]
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape)


def launch(
    logits: Tensor, tid2eid: Tensor, token_ids: Tensor, scaling: float,
    out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    ids, weights = out
    if tid2eid.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tid2eid: expected torch.int32 or torch.int64, got {tid2eid.dtype}")
    sizes = check_tensors(
        logits=(logits, "T E", torch.float32),
        tid2eid=(tid2eid, "V K", tid2eid.dtype),
        token_ids=(token_ids, "T", torch.int64),
        ids=(ids, "T K", torch.int32),
        weights=(weights, "T K", torch.float32),
    )
    T, E, K = sizes["T"], sizes["E"], sizes["K"]
    if T == 0:
        return
    router_hash_kernel[(triton.cdiv(T, CONFIG["BLOCK_T"]),)](
        logits, tid2eid, token_ids, ids, weights, T, sizes["V"], scaling,
        E=E, K=K, BLOCK_K=triton.next_power_of_2(K), **CONFIG, **PDL,
    )  # fmt: skip


SPEC = KernelSpec("router_hash/triton", launch, runs_on_cpu=INTERPRETED)
