"""RMSNorm and its fusions, registered as torch.ops.dsv4.*; what each does is said by its oracle."""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import norm as kernels

# Best first.
RMS_NORM = (kernels.rms_norm.SPEC,)
RMS_NORM_QUANT = (kernels.rms_norm_quant.SPEC,)
Q_NORM_ROPE = (kernels.q_norm_rope.SPEC,)
KV_NORM_ROPE_QUANT_INSERT = (kernels.kv_norm_rope_quant_insert.SPEC,)
Q_KV_NORM_ROPE_INSERT = (kernels.q_kv_norm_rope_insert.SPEC,)
INVERSE_ROPE = (kernels.inverse_rope.SPEC,)
INVERSE_ROPE_QUANT = (kernels.inverse_rope_quant.SPEC,)


def _nothing(*args: object, **kwargs: object) -> None:
    """The fake of an op that only changes tensors."""


@dsv4_op(fake=kernels.rms_norm.outputs)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See dsv4.reference.norm.rms_norm."""
    out = kernels.rms_norm.outputs(x, weight, eps)
    select(RMS_NORM, x.device).launch(x, weight, eps, out)
    return out


@dsv4_op(fake=kernels.rms_norm_quant.outputs)
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, form: str, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.fused.rms_norm_quant."""
    out = kernels.rms_norm_quant.outputs(x, weight, eps, form, global_scale)
    select(RMS_NORM_QUANT, x.device).launch(x, weight, eps, form, global_scale, out)
    return out


@dsv4_op(fake=kernels.q_norm_rope.outputs)
def q_norm_rope(q: Tensor, cos: Tensor, sin: Tensor, position: Tensor, eps: float) -> Tensor:
    """See dsv4.reference.fused.q_norm_rope."""
    out = kernels.q_norm_rope.outputs(q, cos, sin, position, eps)
    select(Q_NORM_ROPE, q.device).launch(q, cos, sin, position, eps, out)
    return out


@dsv4_op(fake=kernels.kv_norm_rope_quant_insert.outputs, mutates=("window",))
def kv_norm_rope_quant_insert(
    kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.fused.kv_norm_rope_quant_insert."""
    args = (kv, norm, cos, sin, window, slot, position, end_position, rows, eps)
    out = kernels.kv_norm_rope_quant_insert.outputs(*args)
    select(KV_NORM_ROPE_QUANT_INSERT, kv.device).launch(*args, out)
    return out


@dsv4_op(fake=kernels.q_kv_norm_rope_insert.outputs, mutates=("window",))
def q_kv_norm_rope_insert(
    q: Tensor, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, window: Tensor, slot: Tensor,
    position: Tensor, end_position: Tensor, rows: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.fused.q_kv_norm_rope_insert."""
    args = (q, kv, norm, cos, sin, window, slot, position, end_position, rows, eps)
    out = kernels.q_kv_norm_rope_insert.outputs(*args)
    select(Q_KV_NORM_ROPE_INSERT, q.device).launch(*args, out)
    return out


@dsv4_op(fake=_nothing, mutates=("o",))
def inverse_rope(o: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> None:
    """See dsv4.reference.fused.inverse_rope."""
    select(INVERSE_ROPE, o.device).launch(o, cos, sin, position)


@dsv4_op(fake=kernels.inverse_rope_quant.outputs)
def inverse_rope_quant(
    o: Tensor, cos: Tensor, sin: Tensor, position: Tensor, group: int = 128
) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.fused.inverse_rope_quant."""
    out = kernels.inverse_rope_quant.outputs(o, cos, sin, position, group)
    select(INVERSE_ROPE_QUANT, o.device).launch(o, cos, sin, position, group, out)
    return out
