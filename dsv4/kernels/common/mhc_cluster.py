"""Host side of mhc_cluster.cu: its constants, its arguments, and launches as clusters of 16."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.core.errors import KernelUnavailable
from dsv4.kernels.common import cuda
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.mhc import N

CTAS, TILE = 16, 16  # blocks of a cluster, tokens of a tile
MAX_D = 7168  # what fits into shared memory
LEAST_EPS, MOST_EPS = 1e-7, 1.0  # where what Sinkhorn multiplies stays within FP32 (mhc_device.cu)
DEVICE = Path(__file__).with_name("mhc_device.cu")  # stands in front of the kernels' text
_POINTERS = (
    "o", "x", "post", "comb", "fn", "scale", "base", "norm", "streams", "y", "new_post", "new_comb",
    "value", "fp8_scale",
)  # fmt: skip


def args_type(*pointers: str) -> type[ctypes.Structure]:
    """`struct Args` of the device code, with these behind the pointers that all kernels have."""
    fields = [(name, ctypes.c_void_p) for name in (*_POINTERS, *pointers)]
    numbers = (("T", ctypes.c_int), ("iters", ctypes.c_int), ("norm_eps", ctypes.c_float),
               ("eps", ctypes.c_float))  # fmt: skip
    return type("Args", (ctypes.Structure,), {"_fields_": [*fields, *numbers]})


Args = args_type()


def why_not(x: Tensor, eps: float | None = None) -> str | None:
    """Why these streams need the portable kernel, or None. eps: of Sinkhorn; the head has none."""
    D = x.shape[-1]
    if x.dtype is not torch.bfloat16:
        return f"x: expected torch.bfloat16, got {x.dtype}"
    if D % 1024 or not 0 < D <= MAX_D:
        return f"x: expected a last dim that is a multiple of 1024 up to {MAX_D}, got {D}"
    if eps is not None and not LEAST_EPS <= eps <= MOST_EPS:
        return f"eps: expected a number from {LEAST_EPS:g} to {MOST_EPS:g}, got {eps}"
    return None


@cache
def source(
    name: str, D: int, rows: int, post: bool, quantise: bool, norm_bf16: bool
) -> cuda.Source:
    """The device function `name` for these constants."""
    defines: dict[str, Any] = {
        "KERNEL": name, "D": D, "ROWS": rows, "POST": int(post), "QUANTISE": int(quantise),
        "NORM_BF16": int(norm_bf16), "ARGS_BYTES": ctypes.sizeof(Args),
    }  # fmt: skip
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), name, defines, (DEVICE,))


def plan(D: int, rows: int, quantise: bool) -> tuple[int, int]:
    """Threads of a block and bytes of `struct Shared`."""
    slab = D // CTAS
    warps = slab // 32
    floats = rows * (N * slab + 4) + warps * TILE * 26 + 2 * CTAS * (rows + 4) + 2 * TILE * N
    floats += 2 * CTAS * TILE * (1 + quantise) + TILE * (N + N * N) + 3 * warps * TILE
    return 32 * (warps + 1), 4 * floats + 8 * 7


def start(
    name: str, rows: int, x: Tensor, tensors: dict[str, Tensor], iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> None:  # fmt: skip
    """Launch for the tokens of x. tensors: the pointers of `Args`; those not named are null."""
    if reason := why_not(x, eps if rows > N else None):
        op = name.removesuffix("_kernel")
        raise KernelUnavailable(f"{op}/sm90: {reason}: call torch.ops.dsv4.{op}")
    vectors = "o", "x", "fn", "streams", "y"
    check_aligned(16, **{key: tensors[key] for key in vectors if key in tensors})
    T, _, D = x.shape
    is_bf16 = tensors["norm"].dtype is torch.bfloat16
    threads, num_bytes = plan(D, rows, quantise)
    text = source(name, D, rows, "o" in tensors, quantise, is_bf16)
    kernel = cuda.load(text, x.device, num_bytes)
    clusters = min(-(-T // TILE), kernel.resident_clusters(threads, CTAS))
    pointers = {key: t.data_ptr() for key, t in tensors.items()}
    args = Args(**pointers, T=T, iters=iters, norm_eps=norm_eps, eps=eps)
    kernel.launch(CTAS * clusters, threads, args, overlaps=True, cluster=CTAS)
