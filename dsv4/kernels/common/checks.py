"""Argument checks that several kernels share. Raise ValueError naming the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.checks import check_tensors

FLOATS = (torch.float32, torch.bfloat16)


def check_float(name: str, x: Tensor | torch.dtype) -> torch.dtype:
    """The dtype, FP32 or BF16, of a tensor or of a `dtype` argument."""
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    if dtype not in FLOATS:
        raise ValueError(f"{name}: expected torch.float32 or torch.bfloat16, got {dtype}")
    return dtype


def check_int(name: str, value: int, low: int = 1) -> None:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")


def check_stride(name: str, x: Tensor, nbytes: int, what: str) -> None:
    """A uint8 store [count, nbytes]."""
    if x.dim() != 2 or x.shape[1] != nbytes:
        raise ValueError(f"{name}: expected [count, {nbytes}] for {what}, got {list(x.shape)}")


def check_aligned(nbytes: int, **tensors: Tensor) -> None:
    """Data at a multiple of `nbytes`, the size of a load or of an asynchronous copy."""
    for name, x in tensors.items():
        if x.numel() and x.data_ptr() % nbytes:
            expected = f"an address that is a multiple of {nbytes}"
            raise ValueError(f"{name}: expected {expected}, got {x.data_ptr():#x}")


def check_power_of_two(name: str, size: int) -> None:
    """A size that a Triton tile can have."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"{name}: expected a size that is a power of two, got {size}")


def check_pairs(rope_dim: int, dims: int) -> None:
    """Between 1 pair and as many as fit into `dims`."""
    if not 2 <= rope_dim <= dims:
        raise ValueError(f"cos: expected 1 to {dims // 2} pairs, got {rope_dim // 2}")


def check_angles(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> int:
    """How many dims of vectors x [..., C] the tables of every position turn; 0 without tables."""
    if cos is None and sin is None:
        return 0
    if cos is None or sin is None:
        missing = "cos" if cos is None else "sin"
        raise ValueError(f"{missing}: expected both cos and sin, or neither, got the other alone")
    dims = (
        2
        * check_tensors(cos=(cos, "S pairs", torch.float32), sin=(sin, "S pairs", torch.float32))[
            "pairs"
        ]
    )
    if cos.device != x.device:
        raise ValueError(f"cos: expected device {x.device}, got {cos.device}")
    check_pairs(dims, x.shape[-1])
    return dims
