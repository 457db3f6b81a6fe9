"""mHC ops, registered as torch.ops.dsv4.*; what each does is said by its oracle."""

from types import ModuleType

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import mhc as kernels

# Best first. All but the last of each take BF16 streams of some widths and numbers of tokens; those
# that make maps, some eps.
MHC_POST_PRE = (
    kernels.mhc_post_pre_many_sm90,
    kernels.mhc_post_pre_sm90,
    kernels.mhc_post_pre,
)
MHC_POST_PRE_FEW = (kernels.mhc_post_pre_few_sm90, *MHC_POST_PRE)
MHC_PRE_NORM = (kernels.mhc_pre_norm_sm90, kernels.mhc_pre_norm)
MHC_POST = (kernels.mhc_post.SPEC,)
HC_HEAD_NORM = (kernels.hc_head_norm_sm90, kernels.hc_head_norm)


def _kernel(modules: tuple[ModuleType, ...], x: Tensor, eps: float | None = None) -> ModuleType:
    """The first that dtype, width, number of tokens, eps of maps and device fit."""
    *wide, portable = modules
    fitting = [m for m in wide if x.dim() == 3 and m.why_not(x, eps=eps) is None]
    found = (*fitting, portable)
    spec = select(tuple(m.SPEC for m in found), x.device)
    return next(m for m in found if m.SPEC is spec)


@dsv4_op(fake=lambda *args: kernels.mhc_post_pre.outputs(*args)[:6])
def mhc_post_pre(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.mhc.mhc_post_pre."""
    args = (o, x, post, comb, fn, scale, base, norm, iters, norm_eps, eps, quantise)
    kernel = _kernel(MHC_POST_PRE if quantise else MHC_POST_PRE_FEW, x, eps)
    out = kernel.outputs(*args)
    kernel.launch(*args, out)
    streams, y, new_post, new_comb, value, fp8_scale = out[:6]
    return streams, y, new_post, new_comb, value, fp8_scale


@dsv4_op(fake=lambda *args: kernels.mhc_pre_norm.outputs(*args)[:5])
def mhc_pre_norm(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.mhc.mhc_pre_norm."""
    args = (x, fn, scale, base, norm, iters, norm_eps, eps, quantise)
    kernel = _kernel(MHC_PRE_NORM, x, eps)
    out = kernel.outputs(*args)
    kernel.launch(*args, out)
    y, post, comb, value, fp8_scale = out[:5]
    return y, post, comb, value, fp8_scale


@dsv4_op(fake=kernels.mhc_post.outputs)
def mhc_post(o: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See dsv4.reference.mhc.mhc_post."""
    out = kernels.mhc_post.outputs(o, x, post, comb)
    select(MHC_POST, x.device).launch(o, x, post, comb, out)
    return out


@dsv4_op(fake=lambda *args: kernels.hc_head_norm.outputs(*args)[0])
def hc_head_norm(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float
) -> Tensor:
    """See dsv4.reference.mhc.hc_head_norm."""
    args = (x, fn, scale, base, norm, norm_eps, eps)
    kernel = _kernel(HC_HEAD_NORM, x)
    out = kernel.outputs(*args)
    kernel.launch(*args, out)
    return out[0]
