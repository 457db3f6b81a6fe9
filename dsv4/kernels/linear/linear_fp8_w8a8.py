"""linear_fp8 of an input that is FP8 already, with scales as fp8_act_quantize gives them. Triton.

The kernels are those of linear_fp8, which round nothing then; bits are those of linear_fp8 with
quantize_input on the numbers that were rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.linear import linear_fp8

REFERENCE = "dsv4.reference.linear:linear_fp8_w8a8"
CONFIG, PRODUCTS, tensor_core = linear_fp8.CONFIG, linear_fp8.PRODUCTS, linear_fp8.tensor_core

linear_fp8_w8a8_kernel = linear_fp8.linear_fp8_kernel


def outputs(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int
) -> tuple[Tensor, ...]:
    """Allocate what linear_fp8 does."""
    return linear_fp8.outputs(x, weight, scale, groups, True)


def launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    linear_fp8.check(x, weight, scale, groups, True, out[0], x_scale)
    linear_fp8.multiply(x, x_scale.view(torch.uint8), weight, scale, groups, True, out)


SPEC = KernelSpec("linear_fp8_w8a8/triton", launch, runs_on_cpu=INTERPRETED)
