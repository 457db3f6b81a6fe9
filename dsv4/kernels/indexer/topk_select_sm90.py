"""Top k of each row on Hopper: one histogram and ranks in one bin (topk_select_sm90.cu).

A bisection of 20 steps, as the portable kernel does it, is 20 reductions over a whole program: 10.8
us for 8192 scores of one row on an H200, where this one takes 6.2.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

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


@cache
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
    threads = CONFIG["THREADS"]
    select = cuda.load(topk_select_kernel(block, topk, False), scores.device, 0)
    select.launch(T * blocks, threads, args, overlaps=not is_first)
    if blocks > 1:
        merge = topk_select_kernel(triton.next_power_of_2(blocks * topk), topk, True)
        cuda.load(merge, scores.device, 0).launch(T, threads, args, overlaps=True)


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
