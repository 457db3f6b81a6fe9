"""How far a BF16 product with FP32 sums may be from the truth, whoever adds."""

from itertools import pairwise

from torch import Tensor

from dsv4.kernels.common.linear_plan import BLOCK, wide_cut

TERMS = 16  # columns that the matrix unit adds to a sum at a time


def wide_error(x: Tensor, weight: Tensor) -> Tensor:
    """[T, N] FP64: the error that `wide_linear` may make.

        additions * 2^-23 * sum_k |w_k x_k|

    Products are exact, and the sum so far is at most the sum of magnitudes. Every addition cuts off
    what FP32 cannot hold: the matrix unit rounds towards zero, up to one unit in the last place,
    and always in the same direction, so that a sum of equal signs loses half a unit every time. An
    FP32 product of PyTorch, which rounds to nearest, is no measure for that.
    """
    c = wide_cut(*weight.shape)
    firsts = [c.first_block(i, weight.shape[1]) for i in range(c.num_chunks + 1)]
    longest = max(b - a for a, b in pairwise(firsts))
    additions = longest * BLOCK // TERMS + c.num_chunks
    return additions * 2.0**-23 * (x.double().abs() @ weight.double().abs().T)


def assert_within(name: str, got: Tensor, exact: Tensor, limit: Tensor) -> None:
    """|got - exact| <= limit everywhere; NaN fails."""
    over = (got.double() - exact).abs() / limit
    assert bool((over <= 1).all()), f"{name}: {over.max().item():.3g} times the error allowed"
