"""Linear ops, registered as torch.ops.dsv4.*; what each does is said by its oracle.

A row of a result depends on its own input alone, bit for bit: not on how many rows there are.
"""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import linear as kernels

# Best first.
LINEAR_FP8 = (kernels.linear_fp8_sm90.SPEC, kernels.linear_fp8.SPEC)
LINEAR_FP8_PROMPT = (kernels.linear_fp8_prompt_sm90.SPEC, kernels.linear_fp8.SPEC)
LINEAR_FP8_ANY = (kernels.linear_fp8.SPEC,)
LINEAR_FP8_W8A8 = (kernels.linear_fp8_w8a8_sm90.SPEC, kernels.linear_fp8_w8a8.SPEC)
LINEAR_FP8_W8A8_ANY = (kernels.linear_fp8_w8a8.SPEC,)
JOINED_WIDE_LINEAR = (kernels.joined_wide_linear_sm90.SPEC, kernels.joined_wide_linear.SPEC)
JOINED_WIDE_LINEAR_ANY = (kernels.joined_wide_linear.SPEC,)
WIDE_LINEAR = (kernels.wide_linear_sm90.SPEC, kernels.wide_linear.SPEC)
WIDE_LINEAR_ANY = (kernels.wide_linear.SPEC,)


def _fake_linear_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int = 1, quantize_input: bool = False
) -> Tensor:
    return kernels.linear_fp8.result(x, weight, scale, groups, quantize_input)


@dsv4_op(fake=_fake_linear_fp8)
def linear_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int = 1, quantize_input: bool = False
) -> Tensor:
    """See dsv4.reference.linear.linear_fp8."""
    args, prompt = (x, weight, scale, groups, quantize_input), kernels.linear_fp8_prompt_sm90
    if kernels.linear_fp8_sm90.takes(x, weight, groups):
        which = LINEAR_FP8
    elif prompt.takes(x, weight, groups, quantize_input):
        which = LINEAR_FP8_PROMPT
    else:
        which = LINEAR_FP8_ANY
    kernel = select(which, x.device)
    out = (prompt if kernel is prompt.SPEC else kernels.linear_fp8).outputs(*args)
    kernel.launch(*args, out)
    return out[0]


def _fake_linear_fp8_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int = 1
) -> Tensor:
    return kernels.linear_fp8.result(x, weight, scale, groups, False)


@dsv4_op(fake=_fake_linear_fp8_w8a8)
def linear_fp8_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int = 1
) -> Tensor:
    """See dsv4.reference.linear.linear_fp8_w8a8."""
    few = kernels.linear_fp8_sm90.takes(x, weight, groups)
    out = kernels.linear_fp8_w8a8.outputs(x, x_scale, weight, scale, groups)
    kernel = select(LINEAR_FP8_W8A8 if few else LINEAR_FP8_W8A8_ANY, x.device)
    kernel.launch(x, x_scale, weight, scale, groups, out)
    return out[0]


@dsv4_op(fake=lambda x, weight: kernels.wide_linear.result(x, weight))
def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See dsv4.reference.linear.wide_linear."""
    few = kernels.wide_linear_sm90.takes(x, weight)
    out = kernels.wide_linear.outputs(x, weight)
    select(WIDE_LINEAR if few else WIDE_LINEAR_ANY, x.device).launch(x, weight, out)
    return out[0]


@dsv4_op(fake=lambda *args: kernels.joined_wide_linear.result(*args))
def joined_wide_linear(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int]
) -> Tensor:
    """See dsv4.reference.linear.joined_wide_linear."""
    few = kernels.wide_linear_sm90.takes(x, weight)
    out = kernels.joined_wide_linear.outputs(x, weight, bias, position, parts)
    kernel = select(JOINED_WIDE_LINEAR if few else JOINED_WIDE_LINEAR_ANY, x.device)
    kernel.launch(x, weight, bias, position, parts, out)
    return out[0]
