"""Router ops, registered as torch.ops.dsv4.*; what each does is said by its oracle."""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import router as kernels

# Best first.
ROUTER_TOPK = (kernels.router_topk.SPEC,)
ROUTER_HASH = (kernels.router_hash.SPEC,)
MOE_ALIGN = (kernels.moe_align.SPEC,)


@dsv4_op(fake=kernels.router_topk.outputs)
def router_topk(
    logits: Tensor, bias: Tensor, k: int, scaling: float, is_padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.routing.router_topk."""
    out = kernels.router_topk.outputs(logits, bias, k, scaling, is_padding)
    select(ROUTER_TOPK, logits.device).launch(logits, bias, k, scaling, is_padding, out)
    return out


@dsv4_op(fake=kernels.router_hash.outputs)
def router_hash(
    logits: Tensor, tid2eid: Tensor, token_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.routing.router_hash."""
    out = kernels.router_hash.outputs(logits, tid2eid, token_ids, scaling)
    select(ROUTER_HASH, logits.device).launch(logits, tid2eid, token_ids, scaling, out)
    return out


@dsv4_op(fake=lambda *args, **kwargs: kernels.moe_align.outputs(*args, **kwargs)[:5])
def moe_align(
    experts: Tensor, first_expert: int, num_experts: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See dsv4.reference.routing.moe_align."""
    args = experts, first_expert, num_experts, block_size
    out = kernels.moe_align.outputs(*args)
    select(MOE_ALIGN, experts.device).launch(*args, out)
    return out[:5]
