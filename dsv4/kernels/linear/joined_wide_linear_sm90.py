"""Several BF16 weights times one input for few tokens on Hopper: see wide_linear_sm90.cu.

The device function is that of `wide_linear`, built with a bias and a place for every part.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda
from dsv4.kernels.linear import wide_linear_sm90
from dsv4.kernels.linear.joined_wide_linear import REFERENCE, check, outputs
from dsv4.kernels.linear.wide_linear_sm90 import CONFIG, Plan

__all__ = ["CONFIG", "REFERENCE", "SPEC", "joined_wide_linear_kernel", "launch", "outputs"]


def joined_wide_linear_kernel(p: Plan) -> cuda.Source:
    """The source with its constants."""
    return wide_linear_sm90.wide_linear_kernel(p, True)


def sources() -> Iterator[tuple[cuda.Source, str]]:
    """What ahead-of-time compilation builds, and the instruction it must hold."""
    return wide_linear_sm90.sources(True)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int],
    out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill y. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    y, _, _ = out
    _, _, _, R, *bounds = check(x, weight, bias, position, parts, y)
    wide_linear_sm90.start(x, weight, y, bias, position, R, *bounds)


SPEC = KernelSpec("joined_wide_linear/sm90", launch, arch=(9,), requires=cuda.why_not)
