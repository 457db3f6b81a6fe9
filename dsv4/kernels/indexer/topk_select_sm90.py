"""Top k of each row on Hopper: one histogram and ranks in one bin (topk_select_sm90.cu).

A bisection of 20 steps, as the portable kernel does it, is 20 reductions over a whole program: 10.8
us for 8192 scores of one row on an H200, where this one takes 6.2.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common import cuda
from dsv4.kernels.indexer.topk_select import REFERENCE, block_size, check, outputs

__all__ = ["CONFIG", "REFERENCE", "SPEC", "launch", "outputs", "topk_select_kernel"]

CONFIG = {"THREADS": 1024}


class Args(ctypes.Structure):
    """`struct Args` of the device code."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("scores", "lengths", "out", "keys", "ids")),
        ("S", ctypes.c_longlong),
        ("blocks", ctypes.c_int),
        ("block", ctypes.c_int),
    ]


def topk_select_kernel(num_keys: int, topk: int, is_merge: bool) -> cuda.Source:
    """The source for programs of `num_keys`."""
    defines = {
        "ITEMS": max(num_keys // CONFIG["THREADS"], 1), "K": topk, "MERGE": int(is_merge)
    }  # fmt: skip
    return cuda.Source.of(Path(__file__).with_suffix(".cu"), "topk_select_kernel", defines)


def launch_select(
    scores: Tensor, lengths: Tensor, topk: int, out: Tensor, keys: Tensor, ids: Tensor,
    is_first: bool,
) -> None:  # fmt: skip
    """Start the kernels on checked tensors; `is_first` if no kernel of the op came before."""
    T, S = scores.shape
    block = block_size(S, topk) if topk < S else 16
    blocks = triton.cdiv(S, block) if topk < S else 1
    args = Args(
        *(x.data_ptr() for x in (scores, lengths, out, keys, ids)), S=S, blocks=blocks, block=block
    )
    device = scores.device
    _launcher(topk_select_kernel(block, topk, False), device)(args, T * blocks, not is_first)
    if blocks > 1:
        merge = triton.next_power_of_2(blocks * topk)
        _launcher(topk_select_kernel(merge, topk, True), device)(args, T, True)


@cache
def _launcher(source: cuda.Source, device: torch.device) -> Callable[[Args, int, bool], None]:
    kernel, driver = cuda.load(source, device, 0), cuda.driver
    overlap = driver.CUlaunchAttribute()
    attribute = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.id = attribute
    overlap.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
    config.blockDimX = CONFIG["THREADS"]

    def start(args: Args, grid: int, is_overlapped: bool) -> None:
        config.gridDimX = grid
        config.attrs, config.numAttrs = [overlap] * is_overlapped, int(is_overlapped)
        config.hStream = torch.cuda.current_stream(device).cuda_stream
        pointer: Any = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        parameters = ctypes.addressof(pointer)
        (status,) = driver.cuLaunchKernelEx(config, kernel.function, parameters, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuLaunchKernelEx: {status}")

    return start


def launch(
    scores: Tensor, lengths: Tensor, topk: int, out: tuple[Tensor, Tensor, Tensor]
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    if check(scores, lengths, topk, out):
        launch_select(scores, lengths, topk, *out, is_first=True)


def sources() -> list[tuple[cuda.Source, str]]:
    """What is compiled ahead of time, with the instruction each must hold."""
    sizes = ((8192, 512, False), (8192, 1024, False), (2048, 512, False), (16, 32, False),
             (16384, 512, True), (32768, 1024, True))  # fmt: skip
    return [(topk_select_kernel(*size), "ATOMS") for size in sizes]


SPEC = KernelSpec("topk_select/sm90", launch, arch=(9,), requires=cuda.why_not)
