"""FP8 with a UE8M0 scale per 128 x 128, the format of weights. Triton, SM 8.9 on.

Unlike the oracle it does not refuse NaN and infinity, which the host would have to read back: the
block that holds one gets the NaN scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import (
    FP8_FLOOR_BITS,
    FP8_MAX,
    amax_bits,
    e8m0_byte,
    e8m0_inverse,
    widen,
)
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import e4m3_byte

REFERENCE = "dsv4.reference.quant:fp8_block_quantize"
CONFIG = {"num_warps": 8}
BLOCK = 128


@triton.jit
def fp8_block_quantize_kernel(w_ptr, data_ptr, scale_ptr, N, K, BLOCK: tl.constexpr):
    block_n, block_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.arange(0, BLOCK)[:, None]
    k = block_k * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (n < N - block_n * BLOCK) & (k < K)
    at = block_n * BLOCK * K + n.to(tl.int64) * K + k
    w = widen(tl.load(w_ptr + at, mask, 0.0))
    scale = e8m0_byte(tl.max(amax_bits(w), axis=0), FP8_FLOOR_BITS, FP8_MAX)
    tl.store(data_ptr + at, e4m3_byte(w * e8m0_inverse(scale)), mask)
    tl.store(scale_ptr + block_n * tl.cdiv(K, BLOCK) + block_k, scale.to(tl.uint8))


def outputs(w: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the values [N, K] and the scales, rounded up. Doubles as the op's fake."""
    if w.dim() != 2:
        raise ValueError(f"w: expected a matrix [N, K], got shape {list(w.shape)}")
    scale = w.new_empty([-(-size // BLOCK) for size in w.shape], dtype=torch.float8_e8m0fnu)
    return w.new_empty(w.shape, dtype=torch.float8_e4m3fn), scale


def launch(w: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    data, scale = out
    sizes = check_tensors(
        w=(w, "N K", check_float("w", w)),
        data=(data, "N K", torch.float8_e4m3fn),
        scale=(scale, " ".join(str(-(-n // BLOCK)) for n in w.shape), torch.float8_e8m0fnu),
    )
    N, K = sizes["N"], sizes["K"]
    if N == 0 or K == 0:
        return
    fp8_block_quantize_kernel[(triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK))](
        w, data.view(torch.uint8), scale.view(torch.uint8), N, K, BLOCK=BLOCK, **CONFIG, **EXACT
    )


SPEC = KernelSpec("fp8_block_quantize/triton", launch, runs_on_cpu=INTERPRETED)
