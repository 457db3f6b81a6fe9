"""RMSNorm and the cast of a linear layer's input, one row a program. Triton, SM 8.9 and later."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.rows import fp8_rows, mxfp4_rows, nvfp4_rows, rounded

REFERENCE = "dsv4.reference.fused:rms_norm_quant"
CONFIG = {"LANES": 1024}  # elements a warp holds
GROUPS = {"fp8": 128, "mxfp4": 32, "nvfp4": 16}


@triton.jit
def rms_norm_quant_kernel(
    x_ptr, weight_ptr, share_ptr, value_ptr, scale_ptr, eps,
    D: tl.constexpr, BF16: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = D // GROUP
    t = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    g_G1, j_1J = g[:, None], tl.arange(0, GROUP)[None, :]
    d, mask = g_G1 * GROUP + j_1J, (g_G1 < G) & (j_1J < GROUP)
    weight = widen(tl.load(weight_ptr + d, mask, 0.0))
    x = widen(tl.load(x_ptr + t * D + d, mask, 0.0))
    mean = tl.div_rn(tl.sum(tl.sum(x * x, axis=1), axis=0), D * 1.0)
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    y = rounded(x * factor * weight, BF16)
    if FORM == "fp8":
        value, scale = fp8_rows(y)
        tl.store(value_ptr + t * D + d, value, mask)
    else:
        if FORM == "mxfp4":
            packed, scale = mxfp4_rows(y, BLOCK_G, GROUP)
        else:
            packed, scale = nvfp4_rows(y, tl.load(share_ptr), BLOCK_G, GROUP)
        k = tl.arange(0, GROUP // 2)[None, :]
        at = t * (D // 2) + g_G1 * (GROUP // 2) + k
        tl.store(value_ptr + at, packed, (g_G1 < G) & (k < GROUP))
    tl.store(scale_ptr + t * G + g, scale, g < G)


def outputs(
    x: Tensor, weight: Tensor, eps: float, form: str, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Allocate the values and the scales. Doubles as the op's fake."""
    value_dtype, scale_dtype, per_byte = _dtypes(form)
    *rows, D = x.shape
    value = x.new_empty((*rows, D // per_byte), dtype=value_dtype)
    return value, x.new_empty((*rows, D // GROUPS[form]), dtype=scale_dtype)


def launch(
    x: Tensor, weight: Tensor, eps: float, form: str, global_scale: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    value_dtype, scale_dtype, per_byte = _dtypes(form)
    value, scale = out
    *rows, D = x.shape
    group = GROUPS[form]
    if D == 0 or D % group:
        raise ValueError(f"x: expected a last dim divisible by {group}, got shape {list(x.shape)}")
    if (form == "nvfp4") != (global_scale is not None):
        raise ValueError(f"global_scale: expected one with nvfp4 alone, got form {form!r}")
    share: dict[str, Any] = {} if global_scale is None else {
        "global_scale": (global_scale, "", torch.float32)
    }  # fmt: skip
    lead = " ".join(map(str, rows))
    check_tensors(
        x=(x, f"{lead} {D}", check_float("x", x)),
        weight=(weight, str(D), check_float("weight", weight)),
        value=(value, f"{lead} {D // per_byte}", value_dtype),
        scale=(scale, f"{lead} {D // group}", scale_dtype),
        **share,
    )
    if x.numel() == 0:
        return
    block = triton.next_power_of_2(D // group)
    rms_norm_quant_kernel[(x.numel() // D,)](
        x, weight, global_scale, value.view(torch.uint8), scale.view(torch.uint8), eps, D=D,
        BF16=x.dtype is torch.bfloat16, FORM=form, GROUP=group, BLOCK_G=block,
        num_warps=min(max(block * group // CONFIG["LANES"], 1), 16), **EXACT,
    )  # fmt: skip


def _dtypes(form: str) -> tuple[torch.dtype, torch.dtype, int]:
    """Dtypes of the values and the scales, and values in a byte."""
    dtypes = {
        "fp8": (torch.float8_e4m3fn, torch.float8_e8m0fnu, 1),
        "mxfp4": (torch.uint8, torch.float8_e8m0fnu, 2),
        "nvfp4": (torch.uint8, torch.float8_e4m3fn, 2),
    }
    if form not in dtypes:
        raise ValueError(f"form: expected one of {tuple(dtypes)}, got {form!r}")
    return dtypes[form]


SPEC = KernelSpec("rms_norm_quant/triton", launch, runs_on_cpu=INTERPRETED)
