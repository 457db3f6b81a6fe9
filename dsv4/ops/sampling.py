"""Sampling op, registered as torch.ops.dsv4.sample; what it does is said by its oracle."""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import sampling as kernels

# Best first.
SAMPLE = (kernels.sample.SPEC,)


@dsv4_op(fake=lambda *args, **kwargs: kernels.sample.outputs(*args, **kwargs)[0])
def sample(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.sampling.sample."""
    args = logits, temperature, seed, position, top_k, top_p, min_p
    out = kernels.sample.outputs(*args)
    select(SAMPLE, logits.device).launch(*args, out)
    return out[0]
