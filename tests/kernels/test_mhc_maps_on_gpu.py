"""What Sinkhorn on Hopper makes of mixes that have no error of their own."""

import pytest
import torch
from torch import Tensor

from dsv4.kernels import mhc as kernels
from dsv4.reference.mhc import mhc_split_sinkhorn
from dsv4.testing.cases.mhc import N, hard_mixes, maps_case
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = pytest.mark.gpu

D, FEW = 4096, 8
KERNELS = (
    "mhc_post_pre_few_sm90",
    "mhc_post_pre_many_sm90",
    "mhc_post_pre_sm90",
    "mhc_pre_norm_sm90",
)
EACH = 91  # of six kinds: 546 tokens, no whole number of tiles or of launches for few
TOO_MUCH = 3e38 * 128  # as a mix; a finite product before it is multiplied by 1 / RMS


def comb_of(name: str, mixes: Tensor, iters: int, eps: float) -> Tensor:
    """comb of one kernel, which was NaN before."""
    kernel = getattr(kernels, name)
    is_first = name == "mhc_pre_norm_sm90"
    op = "mhc_pre_norm" if is_first else "mhc_post_pre"
    args = maps_case(op, mixes, D, iters=iters, eps=eps, device="cuda")
    out = kernel.outputs(**args)
    for x in out:
        x.view(torch.uint8).fill_(0xFF)
    kernel.launch(**args, out=out)
    return out[2 if is_first else 3].cpu()


def combs(mixes: Tensor, iters: int, eps: float) -> Tensor:
    """comb, once all kernels have made the same; the one for few tokens takes several launches."""
    few, *rest = KERNELS
    want = torch.cat([comb_of(few, part, iters, eps) for part in mixes.split(FEW)])
    for name in rest:
        assert_bits_equal(name, comb_of(name, mixes, iters, eps), want)
    return want


def oracle(mixes: Tensor, iters: int, eps: float) -> Tensor:
    gates = torch.cat([mixes.new_zeros(len(mixes), 2 * N), mixes], dim=1)
    ones, zeros = gates.new_ones(3), gates.new_zeros(gates.shape[1])
    return mhc_split_sinkhorn(gates, ones, zeros, iters, eps)[2]


@pytest.mark.parametrize("iters", [1, 2, 3, 20, 1000])
@pytest.mark.parametrize("eps", [1e-7, 1e-6, 1e-2, 1.0])  # 1e-6 is that of the models
def test_hard_maps(eps: float, iters: int) -> None:
    """Each kind within the contract, and the same bits in all kernels."""
    mixes = hard_mixes(EACH)
    trio = combs(mixes, iters, eps), oracle(mixes, iters, eps), oracle(mixes.double(), iters, eps)
    for kind, parts in enumerate(zip(*(x.split(EACH) for x in trio), strict=True)):
        assert_as_exact_as(f"kind {kind}", *parts)


@pytest.mark.parametrize("iters", [1, 2, 3, 20])
def test_infinite_mixes_spoil_their_token_alone(iters: int) -> None:
    """Inf, or a row of -Inf, makes all of comb NaN, as in the oracle; -Inf beside others none."""
    mixes = hard_mixes(50).double()
    spoiled = mixes.clone()
    spoiled[3::29, 5] = TOO_MUCH
    spoiled[7::29, 8:12] = -TOO_MUCH
    spoiled[11::29, 1:4] = -TOO_MUCH
    clean, got = combs(mixes, iters, 1e-6), combs(spoiled, iters, 1e-6)
    assert bool((got.isnan() == oracle(spoiled.float(), iters, 1e-6).isnan()).all())
    same = (spoiled == mixes).all(dim=1)
    assert_bits_equal("others", got[same], clean[same])
