"""Compressor state of slots before their first token. Triton, any SM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.launch import EXACT, INTERPRETED

REFERENCE = "dsv4.reference.cache_writes:cache_reset"
CONFIG = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def cache_reset_kernel(state_ptr, slot_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.load(slot_ptr + tl.program_id(0))
    if slot >= 0:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        kappa_ptr = state_ptr + slot * (2 * HALF) + i
        tl.store(kappa_ptr, tl.zeros([BLOCK], tl.float32), i < HALF)
        tl.store(kappa_ptr + HALF, tl.full([BLOCK], float("-inf"), tl.float32), i < HALF)


def launch(state: Tensor, slot: Tensor) -> None:
    """Reset the slots. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    sizes = check_tensors(
        state=(state, "slots 2 rows width", torch.float32),
        slot=(slot, "B", torch.int64),
    )
    B, half = sizes["B"], sizes["rows"] * sizes["width"]
    if B == 0:
        return
    grid = (B, triton.cdiv(half, CONFIG["BLOCK"]))
    cache_reset_kernel[grid](state, slot, HALF=half, **CONFIG, **EXACT)


SPEC = KernelSpec("cache_reset/triton", launch, runs_on_cpu=INTERPRETED)
