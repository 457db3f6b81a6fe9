"""Activation op, registered as torch.ops.dsv4.gate_up_swiglu; its oracle says what it does."""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import activation as kernels

# Best first.
GATE_UP_SWIGLU = (kernels.gate_up_swiglu.SPEC,)


@dsv4_op(fake=kernels.gate_up_swiglu.outputs)
def gate_up_swiglu(gate_up: Tensor, limit: float) -> Tensor:
    """See dsv4.reference.activation.gate_up_swiglu."""
    out = kernels.gate_up_swiglu.outputs(gate_up, limit)
    select(GATE_UP_SWIGLU, gate_up.device).launch(gate_up, limit, out)
    return out
