"""FP8 with a scale per 128 x 128, back to BF16 or FP32. Triton, SM 8.9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import e8m0_value
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import cast, e4m3_float

REFERENCE = "dsv4.reference.fused:fp8_block_dequantize"
CONFIG = {"BLOCK_N": 32, "num_warps": 4}
BLOCK = 128


@triton.jit
def fp8_block_dequantize_kernel(
    data_ptr, scale_ptr, out_ptr, N, K, IS_E8M0: tl.constexpr, BF16: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first, block_k = tl.program_id(0).to(tl.int64) * BLOCK_N, tl.program_id(1)
    n = tl.arange(0, BLOCK_N)[:, None]
    k = block_k * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (n < N - first) & (k < K)
    at = first * K + n.to(tl.int64) * K + k
    scale = tl.load(scale_ptr + first // BLOCK * tl.cdiv(K, BLOCK) + block_k)
    if IS_E8M0:
        scale = e8m0_value(scale.to(tl.int32))
    value = e4m3_float(tl.load(data_ptr + at, mask, 0))
    tl.store(out_ptr + at, cast(value * scale, BF16), mask)


def outputs(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate the matrix [N, K]. Doubles as the op's fake."""
    return data.new_empty(data.shape, dtype=dtype)


def launch(data: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    is_e8m0 = scale.dtype == torch.float8_e8m0fnu
    sizes = check_tensors(
        data=(data, "N K", torch.float8_e4m3fn),
        scale=(
            scale, " ".join(str(-(-n // BLOCK)) for n in data.shape),
            torch.float8_e8m0fnu if is_e8m0 else torch.float32,
        ),
        out=(out, "N K", check_float("dtype", dtype)),
    )  # fmt: skip
    N, K = sizes["N"], sizes["K"]
    if N == 0 or K == 0:
        return
    fp8_block_dequantize_kernel[(triton.cdiv(N, CONFIG["BLOCK_N"]), triton.cdiv(K, BLOCK))](
        data.view(torch.uint8), scale.view(torch.uint8) if is_e8m0 else scale, out, N, K,
        IS_E8M0=is_e8m0, BF16=dtype is torch.bfloat16, BLOCK=BLOCK, **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("fp8_block_dequantize/triton", launch, runs_on_cpu=INTERPRETED)
