"""linear_fp8 of few tokens that are FP8 already, for Hopper: the CUDA C++ of linear_fp8_sm90.cu."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda
from dsv4.kernels.linear import linear_fp8_sm90 as few
from dsv4.kernels.linear.linear_fp8 import check
from dsv4.kernels.linear.linear_fp8_w8a8 import REFERENCE, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "linear_fp8_w8a8_kernel", "outputs"]
CONFIG = few.CONFIG

linear_fp8_w8a8_kernel = few.linear_fp8_kernel


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    for T in (1, 16, 32, 64):
        for shape in ((8192, 4096, 8), *few.AOT_SHAPES):
            yield linear_fp8_w8a8_kernel(few.plan(T, *shape), few.ROUNDED, True), "QGMMA"


def launch(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    check(x, weight, scale, groups, True, out[0], x_scale)
    few.multiply(x, x_scale, weight, scale, groups, few.ROUNDED, out)


SPEC = KernelSpec("linear_fp8_w8a8/sm90", launch, arch=(9,), requires=cuda.why_not)
