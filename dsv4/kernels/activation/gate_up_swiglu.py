"""Clamped SwiGLU of a joined gate and up, one token and block of columns a program. Triton."""

import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.bits import widen
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.rows import cast

REFERENCE = "dsv4.reference.activation:gate_up_swiglu"
CONFIG = {"BLOCK_F": 1024, "num_warps": 4}


@triton.jit
def gate_up_swiglu_kernel(
    gate_up_ptr, out_ptr, limit, F: tl.constexpr, BF16: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    gate = widen(tl.load(gate_up_ptr + t * (2 * F) + f, f < F, 0.0))
    up = widen(tl.load(gate_up_ptr + t * (2 * F) + F + f, f < F, 0.0))
    gate = tl.where(gate > limit, limit, gate)  # keeps NaN
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + t * F + f, cast(value, BF16), f < F)


def outputs(gate_up: Tensor, limit: float) -> Tensor:
    """Allocate the result [T, F]. Doubles as the op's fake."""
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def launch(gate_up: Tensor, limit: float, out: Tensor) -> None:
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    dtype = check_float("gate_up", gate_up)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up: expected [T, 2 F], got {list(gate_up.shape)}")
    T, F = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensors(gate_up=(gate_up, f"T {2 * F}", dtype), out=(out, f"T {F}", dtype))
    if not limit > 0:
        raise ValueError(f"limit: expected a number above 0, got {limit}")
    if T == 0 or F == 0:
        return
    gate_up_swiglu_kernel[(T, triton.cdiv(F, CONFIG["BLOCK_F"]))](
        gate_up, out, limit, F=F, BF16=dtype.itemsize == 2, **CONFIG, **PDL, **EXACT
    )


SPEC = KernelSpec("gate_up_swiglu/triton", launch, runs_on_cpu=INTERPRETED)
