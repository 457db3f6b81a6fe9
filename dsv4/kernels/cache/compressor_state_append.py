"""Compressor rows of new tokens into the state ring, one program a token. Triton, SM 9 on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous

REFERENCE = "dsv4.reference.cache_writes:compressor_state_append"
CONFIG = {"num_warps": 4}


@triton.jit
def append_state_row(
    kappa_ptr, gamma_ptr, state_ptr, slot_ptr, position_ptr, end_ptr, t,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of token t, if the ring takes them."""
    slot = tl.load(slot_ptr + t)
    position = tl.load(position_ptr + t)
    end = tl.load(end_ptr + t)
    # A chunk longer than the ring writes its last ROWS tokens: one writer for each row.
    if (slot >= 0) & (position < end) & (position >= end - ROWS):
        c = tl.arange(0, BLOCK)
        row_ptr = state_ptr + (slot * 2 * ROWS + position % ROWS) * WIDTH + c
        tl.store(row_ptr, tl.load(kappa_ptr + t * WIDTH + c, c < WIDTH), c < WIDTH)
        gamma = tl.load(gamma_ptr + t * WIDTH + c, c < WIDTH)
        tl.store(row_ptr + ROWS * WIDTH, gamma, c < WIDTH)


@triton.jit
def compressor_state_append_kernel(
    kappa_ptr, gamma_ptr, state_ptr, slot_ptr, position_ptr, end_ptr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    append_state_row(
        kappa_ptr, gamma_ptr, state_ptr, slot_ptr, position_ptr, end_ptr,
        tl.program_id(0).to(tl.int64), ROWS, WIDTH, BLOCK,
    )  # fmt: skip


def check(
    kappa: Tensor, gamma: Tensor, state: Tensor, slot: Tensor, position: Tensor,
    end_position: Tensor, prefix: str = "",
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments, of which the first three have names with `prefix`; -> T, rows, width."""
    sizes = check_tensors(**{
        f"{prefix}kappa": (kappa, "T width", torch.float32),
        f"{prefix}gamma": (gamma, "T width", torch.float32),
        f"{prefix}state": (state, "slots 2 rows width", torch.float32),
        "slot": (slot, "T", torch.int64),
        "position": (position, "T", torch.int64),
        "end_position": (end_position, "T", torch.int64),
    })  # fmt: skip
    return sizes["T"], sizes["rows"], sizes["width"]


def launch(
    kappa: Tensor, gamma: Tensor, state: Tensor, slot: Tensor, position: Tensor,
    end_position: Tensor,
) -> None:  # fmt: skip
    """Write the rows. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, rows, width = check(kappa, gamma, state, slot, position, end_position)
    if T == 0:
        return
    compressor_state_append_kernel[(T,)](
        kappa, gamma, state, slot, position, end_position,
        ROWS=rows, WIDTH=width, BLOCK=triton.next_power_of_2(width), **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("compressor_state_append/triton", launch, runs_on_cpu=INTERPRETED)
