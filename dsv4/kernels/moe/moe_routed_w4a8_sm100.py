"""Routed experts on tokens rounded to FP8 by the FP4 x FP8 matrix unit of Blackwell. Triton.

Weights and their scales go to the unit as stored (tcgen05.mma kind::mxf8f6f4.block_scale), and the
tokens' scales four times each. Compiled for SM 10 and tested under the interpreter; it has not run
on Blackwell hardware.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.moe import moe_routed_w4a8 as portable
from dsv4.kernels.moe.moe_routed_w4a8 import PRODUCTS, REFERENCE

__all__ = ["CONFIG", "PRODUCTS", "REFERENCE", "SPEC", "launch", "outputs"]

CONFIG = {
    12: {"BM": 16, "BN": 128, "num_warps": 8, "STAGES": 4},
    48: {"BM": 64, "BN": 128, "num_warps": 8, "STAGES": 4},
    1 << 40: {"BM": 128, "BN": 128, "num_warps": 8, "STAGES": 4},
}

moe_routed_w4a8_kernel = portable.moe_routed_w4a8_kernel


def outputs(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The result [T, D] and working memory."""
    args = x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert
    return portable.working_memory(args, CONFIG)


def launch(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill out[0]; the rest is working memory."""
    args = x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert
    portable.run(args, out, CONFIG, is_native=True)


def tensor_core(arch: int, args: dict[str, object]) -> str:
    """The instruction that the compiled products must hold."""
    return r"tcgen05\.mma\S*kind::mxf8f6f4\.block_scale"


SPEC = KernelSpec("moe_routed_w4a8/sm100", launch, arch=(10,))
