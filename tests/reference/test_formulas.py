"""Numbers worked out by hand or published with the model, one sub-block at a time."""

from __future__ import annotations

from math import log, pi, sin

import pytest
import torch

from dsv4.core.config import LayerKind, ModelConfig, YarnScaling
from dsv4.reference.attention import sparse_attn, visible_entries, window_indices
from dsv4.reference.compressor import pool_overlapping_windows, pool_windows
from dsv4.reference.experts import clamped_swiglu
from dsv4.reference.indexer import indexer_scores, indexer_topk
from dsv4.reference.mhc import mhc_post, mhc_split_sinkhorn
from dsv4.reference.norm import rms_norm, rms_norm_unweighted
from dsv4.reference.rope import apply_rope, layer_frequencies, rope_cos_sin, rope_frequencies
from dsv4.reference.router import router_hash, router_scores, router_topk, router_weights
from dsv4.testing.numeric import relative_error


def test_mhc_split_sinkhorn_check_vector() -> None:
    i = torch.arange(24.0)
    base = torch.tensor([0.1 * sin(k) for k in range(24)])
    pre, post, comb = mhc_split_sinkhorn(
        ((i - 12) / 8)[None], torch.tensor([0.5, 0.75, 1.25]), base
    )
    want_pre = torch.tensor([0.3208223, 0.3535780, 0.3695691, 0.3662395])
    want_post = torch.tensor([0.6091185, 0.6407093, 0.7130671, 0.8011589])
    want_comb = torch.tensor(
        [
            [0.26965404, 0.25735256, 0.23993734, 0.23305514],
            [0.22180864, 0.24678539, 0.26803237, 0.26337263],
            [0.24769345, 0.23412926, 0.24529436, 0.27288193],
            [0.26084295, 0.26173183, 0.24673493, 0.23068933],
        ]
    )
    torch.testing.assert_close(pre[0], want_pre, atol=1e-7, rtol=0)
    torch.testing.assert_close(post[0], want_post, atol=1e-7, rtol=0)
    torch.testing.assert_close(comb[0], want_comb, atol=1e-7, rtol=0)


def test_mhc_comb_is_doubly_stochastic() -> None:
    mixes = torch.randn(50, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    comb = mhc_split_sinkhorn(mixes, torch.ones(3).double(), torch.zeros(24).double())[2]
    assert (comb.sum(dim=1) - 1).abs().max() < 1e-5  # columns last: eps only
    assert (comb.sum(dim=2) - 1).abs().max() < 1e-4


def test_mhc_post_sums_over_the_first_index_of_comb() -> None:
    x = torch.eye(4)[None]  # stream j is the unit vector j
    comb = torch.arange(16.0).view(1, 4, 4)
    out = mhc_post(torch.zeros(1, 4), x, torch.ones(1, 4), comb)
    torch.testing.assert_close(out[0], comb[0].T)


def test_yarn_frequencies_check_vector() -> None:
    got = layer_frequencies(ModelConfig.flash(), LayerKind.CSA)
    want = {0: 1.0, 1: 6.8765604e-1, 15: 3.6355385e-3, 16: 2.2656249e-3, 17: 1.3968013e-3,
            20: 2.9697779e-4, 24: 1.9531253e-5, 25: 5.3723124e-6, 31: 5.6805294e-7}  # fmt: skip
    for i, f in want.items():
        assert abs(float(got[i]) / f - 1) < 1e-6, i
    torch.testing.assert_close(
        layer_frequencies(ModelConfig.flash(), LayerKind.SWA), rope_frequencies(64, 10000.0, None)
    )


def test_yarn_ramp_bounds() -> None:
    """low = 15 and high = 25: outside them frequencies are untouched or divided by the factor."""
    theta, yarn = 160000.0, YarnScaling()
    plain, scaled = rope_frequencies(64, theta, None), rope_frequencies(64, theta, yarn)
    assert torch.equal(plain[:16], scaled[:16])
    torch.testing.assert_close(plain[25:] / 16, scaled[25:], rtol=1e-6, atol=0)
    assert 15 < 64 * log(65536 / (32 * 2 * pi)) / (2 * log(theta)) < 16


def test_rope_rotates_interleaved_pairs_and_inverts() -> None:
    freqs = torch.tensor([0.5, 0.25])
    x = torch.tensor([[9.0, 1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    cos, sin_ = rope_cos_sin(torch.tensor([3]), freqs, torch.float64)
    got = apply_rope(x, cos, sin_)[0]
    t = torch.tensor(1.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)
    want = torch.stack([x[0, 0], t[0].cos(), t[0].sin(), -t[1].sin(), t[1].cos()])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(apply_rope(got[None], cos, sin_, inverse=True), x)


def test_rope_angles_are_fp32_products() -> None:
    freqs = layer_frequencies(ModelConfig.flash(), LayerKind.CSA)
    positions = torch.tensor([1_048_575])
    cos, _ = rope_cos_sin(positions, freqs, torch.float64)
    want = (positions.float()[:, None] * freqs).double().cos()
    assert torch.equal(cos, want)


def test_rms_norm() -> None:
    x = torch.tensor([[3.0, 4.0]])
    got = rms_norm(x, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(got, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
    torch.testing.assert_close(
        rms_norm_unweighted(x[:, None], 0.0), torch.tensor([[[3.0, 4.0]]]) / 12.5**0.5
    )
    tiny = torch.full((1, 4), 1e-3)
    torch.testing.assert_close(rms_norm(tiny, torch.ones(4), 1e-6), torch.full((1, 4), 0.5**0.5))


def test_router_scores_check_values() -> None:
    logits = torch.tensor([[-30.0, -3.0, 0.0, 1.0, 25.0]])
    got = router_scores(logits, torch.eye(5))
    want = torch.tensor([[3.0590e-7, 0.2204254, 0.8325546, 1.1459763, 5.0]])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_router_bias_selects_and_does_not_weigh() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    experts = router_topk(scores, torch.tensor([1.0, 0.0, 0.0, 0.0]), 2)
    assert experts.tolist() == [[0, 3]]
    weights = router_weights(scores, experts, 2.5)
    torch.testing.assert_close(weights, torch.tensor([[0.1, 0.4]]) / 0.5 * 2.5)


def test_router_ties_go_to_the_lower_id() -> None:
    assert router_topk(torch.ones(1, 5), torch.zeros(5), 3).tolist() == [[0, 1, 2]]


def test_router_hash_reads_the_row_of_the_token() -> None:
    table = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert router_hash(table, torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]


def test_clamped_swiglu_bounds_the_gate_from_above_only() -> None:
    gate, up = torch.tensor([[100.0, -100.0, 1.0]]), torch.tensor([[-50.0, 3.0, 50.0]])
    silu = torch.nn.functional.silu(torch.tensor([10.0, -100.0, 1.0]))
    torch.testing.assert_close(
        clamped_swiglu(gate, up, 10.0), (silu * torch.tensor([-10.0, 3.0, 10.0]))[None]
    )


def test_sparse_attn_by_hand() -> None:
    """One head, two keys and a sink; -1 and order are inert, the scale does not touch the sink."""
    q = torch.tensor([[[2.0, 0.0]]])
    kv = torch.tensor([[1.0, 5.0], [0.0, 7.0], [3.0, 1.0]])
    sink = torch.tensor([0.3])
    e = torch.tensor([2.0 * 0.5, 0.0, 0.3]).exp()
    want = (e[0] * kv[0] + e[1] * kv[1]) / e.sum()
    got = sparse_attn(q, kv, torch.tensor([[0, 1, -1]]), sink, 0.5)
    torch.testing.assert_close(got[0, 0], want)
    torch.testing.assert_close(sparse_attn(q, kv, torch.tensor([[1, -1, 0]]), sink, 0.5), got)
    assert not sparse_attn(q, kv, torch.tensor([[-1, -1]]), sink, 0.5).any()


def test_sparse_attn_of_no_queries() -> None:
    got = sparse_attn(torch.zeros(0, 2, 4), torch.zeros(3, 4), torch.zeros(0, 3).long(),
                      torch.zeros(2), 1.0)  # fmt: skip
    assert got.shape == (0, 2, 4)


def test_visible_keys() -> None:
    positions = torch.tensor([0, 3, 4, 127, 128])
    assert visible_entries(positions, 4).tolist() == [0, 1, 1, 32, 32]
    assert visible_entries(positions, 128).tolist() == [0, 0, 0, 1, 1]
    assert window_indices(torch.tensor([1, 5]), 0, 3).tolist() == [[-1, 0, 1], [3, 4, 5]]
    assert window_indices(torch.tensor([5]), 3, 3).tolist() == [[0, 1, 2]]


def test_pool_windows_is_a_softmax_in_every_channel() -> None:
    kappa = torch.tensor([[[1.0, 10.0], [3.0, 30.0]]])
    gamma = torch.tensor([[[0.0, 50.0], [0.0, 0.0]]])
    torch.testing.assert_close(pool_windows(kappa, gamma), torch.tensor([[2.0, 10.0]]))


def test_pool_overlapping_windows_uses_first_half_of_previous() -> None:
    """Window 0: own second half only. Window 1: first half of window 0, second half of its own."""
    kappa = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]])  # two windows of one token, d = 1
    gamma = torch.zeros_like(kappa)
    got = pool_overlapping_windows(kappa, gamma)
    torch.testing.assert_close(got, torch.tensor([[2.0], [(1.0 + 8.0) / 2]]))


def test_indexer_scores_relu_and_mask() -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    keys = torch.tensor([[2.0, -3.0], [-1.0, 4.0], [1.0, 1.0]])
    got = indexer_scores(q, keys, torch.tensor([[0.5, 2.0]]), torch.tensor([2]))
    assert got[0, :2].tolist() == [1.0, 8.0]
    assert got[0, 2] == float("-inf")


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
def test_indexer_topk_ties_go_to_the_lower_index(k: int) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    visible = torch.tensor([4, 3])
    scores[1, 3] = float("-inf")
    got = indexer_topk(scores, visible, k).tolist()
    want = {1: [[1], [0]], 2: [[0, 1], [0, 1]], 3: [[0, 1, 2], [0, 1, 2]],
            4: [[0, 1, 2, 3], [0, 1, 2, -1]]}  # fmt: skip
    assert got == want[min(k, 4)]


def test_indexer_topk_equals_a_stable_sort() -> None:
    rng = torch.Generator().manual_seed(1)
    scores = torch.randint(0, 4, (200, 50), generator=rng).float()
    visible = torch.randint(0, 51, (200,), generator=rng)
    scores = scores.masked_fill(torch.arange(50)[None] >= visible[:, None], float("-inf"))
    got = indexer_topk(scores, visible, 7)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :7]
    for row, best, n in zip(got.tolist(), order.tolist(), visible.tolist(), strict=True):
        want = sorted(best[: min(7, n)])
        assert row == want + [-1] * (7 - len(want))


def test_relative_error_can_fail() -> None:
    assert relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])) == 0.5


def test_indexer_refuses_nan_instead_of_selecting_nothing() -> None:
    scores = torch.tensor([[1.0, float("nan"), 2.0]])
    with pytest.raises(ValueError, match="scores: expected numbers, got NaN"):
        indexer_topk(scores, torch.tensor([3]), 2)
