"""Rows of a grouped product by expert; the kernels are those of common.expert_lists."""

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.expert_lists import (
    CONFIG,
    launch,
    moe_align_capacity,
    moe_align_kernel,
    outputs,
)
from dsv4.kernels.common.launch import INTERPRETED

__all__ = ["CONFIG", "SPEC", "launch", "moe_align_capacity", "moe_align_kernel", "outputs"]

REFERENCE = "dsv4.reference.routing:moe_align"

SPEC = KernelSpec("moe_align/triton", launch, runs_on_cpu=INTERPRETED)
