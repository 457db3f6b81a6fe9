"""Oracle of the activation between two matrices of an expert."""

from __future__ import annotations

from torch import Tensor

from dsv4.reference.experts import clamped_swiglu


def gate_up_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU of gate and up that one matrix product made.

        a = silu(min(g, limit)) * clamp(u, -limit, limit)

    gate_up [T, 2 F]: the gate first -> [T, F] in its dtype, one rounding
    """
    gate, up = gate_up.chunk(2, dim=1)
    return clamped_swiglu(gate, up, limit).to(gate_up.dtype)
