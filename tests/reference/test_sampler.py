"""The sampler: what each filter keeps, that draws follow it, and that nothing else matters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.core.errors import RequestError
from dsv4.core.sampling import SamplingParams
from dsv4.reference.sampler import (
    TokenRng,
    filter_logits,
    log_probabilities,
    logprobs,
    philox_4x32,
    sample,
)

INF, NAN = float("inf"), float("nan")
# Powers of two make every probability and every partial sum exact: 8/16, 4/16, 2/16, 1/16, 1/16.
LADDER = torch.tensor([2.0, 8.0, 1.0, 4.0, 1.0]).log()


def kept(logits: Tensor, **params) -> list[int]:
    return filter_logits(logits, SamplingParams(**params)).nonzero().flatten().tolist()


def draws(logits: Tensor, params: SamplingParams, count: int, seed: int = 7) -> np.ndarray:
    rng = TokenRng(seed)
    ids = [sample(logits, params, rng.at(t)) for t in range(count)]
    return np.bincount(ids, minlength=logits.numel())


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("temperature", "1"),
        ("temperature", True), ("top_p", 0.0), ("top_p", 1.1), ("top_p", NAN), ("top_k", -1),
        ("top_k", 1.5), ("min_p", -0.1), ("min_p", 1.5), ("seed", -1), ("seed", 1 << 64),
        ("seed", 0.5), ("max_tokens", 0), ("max_tokens", None), ("stop", "word"), ("stop", ("",)),
        ("stop", (3,)), ("stop_token_ids", (-1,)), ("stop_token_ids", 5), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(name: str, bad: object) -> None:
    with pytest.raises(RequestError, match=f"^{name}: expected") as error:
        SamplingParams(**{name: bad})
    assert error.value.argument == name


def test_parameters_have_the_released_defaults_and_are_frozen() -> None:
    p = SamplingParams(stop=["a", "b"], stop_token_ids=[1])
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.seed) == (1.0, 1.0, 0, 0.0, None)
    assert (p.stop, p.stop_token_ids, p.ignore_eos) == (("a", "b"), (1,), False)
    assert hash(p) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(1,)))
    assert not p.is_greedy
    assert SamplingParams(temperature=0).is_greedy
    with pytest.raises(AttributeError):
        p.top_p = 0.5


# --- random numbers -------------------------------------------------------------------------------


def test_philox_gives_the_published_vectors() -> None:
    ones = 0xFFFFFFFF
    assert philox_4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox_4x32((ones,) * 4, (ones, ones)) == (
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    )  # fmt: skip
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # digits of pi
    assert philox_4x32(counter, (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    )  # fmt: skip


def test_uniform_is_uniform_and_depends_on_all_bits_of_seed_and_position() -> None:
    u = np.array([TokenRng(3, t).uniform() for t in range(4000)])
    assert ((u >= 0) & (u < 1)).all()
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
    others = [TokenRng(3 + (1 << 40), 0), TokenRng(4, 0), TokenRng(3, 1 << 40), TokenRng(3, 1)]
    assert len({TokenRng(3, 0).uniform(), *(r.uniform() for r in others)}) == 5


def test_rng_of_a_request() -> None:
    assert TokenRng.for_request(SamplingParams(seed=5)) == TokenRng(5, 0)
    first, second = (TokenRng.for_request(SamplingParams()) for _ in range(2))
    assert first != second
    with pytest.raises(RequestError, match="position: expected an integer from 0"):
        TokenRng(1, -1)
    with pytest.raises(RequestError, match="seed: expected an integer from 0"):
        TokenRng(1 << 64)


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_best(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 3.0, NAN, 3.0, -INF], dtype=dtype)
    params = SamplingParams(temperature=0, top_k=1)
    assert all(sample(logits, params, TokenRng(s)) == 1 for s in range(20))
    assert filter_logits(logits, params).tolist() == [0, 1, 0, 0, 0]


# --- filters --------------------------------------------------------------------------------------


def test_no_filter_is_softmax_with_temperature() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for t in (0.3, 1.0, 2.5):
        want = (logits.double() / t).softmax(0)
        got = filter_logits(logits, SamplingParams(temperature=t))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_top_k_keeps_the_best_and_breaks_ties_by_id() -> None:
    assert kept(LADDER, top_k=1) == [1]
    assert kept(LADDER, top_k=4) == [0, 1, 2, 3]  # 2 and 4 are equal
    assert kept(LADDER, top_k=5) == kept(LADDER, top_k=99) == kept(LADDER) == [0, 1, 2, 3, 4]
    got = filter_logits(LADDER, SamplingParams(top_k=2))
    torch.testing.assert_close(
        got, torch.tensor([0, 2 / 3, 0, 1 / 3, 0]).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("top_p", "want"),
    [
        (1e-9, [1]), (0.4, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]), (0.95, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, want: list[int]) -> None:
    assert kept(LADDER, top_p=top_p) == want


def test_top_p_reached_exactly_adds_nothing() -> None:
    halves = torch.zeros(4)  # four times 0.25: exact
    assert kept(halves, top_p=0.5) == [0, 1]
    assert kept(halves, top_p=0.5000001) == [0, 1, 2]


@pytest.mark.parametrize(
    ("min_p", "want"), [(0.0, 5), (0.1, 5), (0.2, 3), (0.3, 2), (0.6, 1), (1.0, 1)]
)
def test_min_p_is_relative_to_the_best(min_p: float, want: int) -> None:
    assert len(kept(LADDER, min_p=min_p)) == want


def test_filters_apply_in_the_documented_order() -> None:
    # top_k = 3 leaves 8 + 4 + 2 = 14, of which 8 alone is 0.57; of all 16 it is only 0.5.
    assert kept(LADDER, top_k=3, top_p=0.56) == [1]
    assert kept(LADDER, top_p=0.56) == [1, 3]
    # Temperature first: at T = 0.5 the ladder is 64, 16, 4, 1, 1.
    assert kept(LADDER, temperature=0.5, top_p=0.7) == [1]
    assert kept(LADDER, temperature=0.5, min_p=0.2) == [1, 3]


FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_follow_the_filtered_distribution(params: dict) -> None:
    # The expected shares are worked out here in numpy, from the definitions.
    weight = np.array([2.0, 8.0, 1.0, 4.0, 1.0]) ** (1 / params.get("temperature", 1.0))
    order = np.argsort(-weight, kind="stable")
    keep = order[: params.get("top_k", 0) or 5]
    mass = np.cumsum(weight[keep]) / weight[keep].sum()
    keep = keep[: int((mass < params.get("top_p", 1.0) - 1e-12).sum()) + 1]
    keep = keep[weight[keep] >= params.get("min_p", 0.0) * weight.max()]
    expected = np.zeros(5)
    expected[keep] = weight[keep] / weight[keep].sum()
    count = 4000
    seen = draws(LADDER, SamplingParams(**params), count)
    assert (seen[expected == 0] == 0).all()
    live = expected > 0
    chi_square = ((seen[live] - count * expected[live]) ** 2 / (count * expected[live])).sum()
    assert chi_square < 18.5  # p = 0.001 for 4 degrees of freedom, less for fewer


# --- determinism ----------------------------------------------------------------------------------


def test_a_token_depends_on_seed_and_position_alone() -> None:
    logits = torch.randn(100, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=1.5)
    forward = [sample(logits, params, TokenRng(11).at(t)) for t in range(50)]
    torch.manual_seed(999)
    torch.rand(10)
    backward = [sample(logits, params, TokenRng(11, t)) for t in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != [sample(logits, params, TokenRng(12, t)) for t in range(50)]
    assert len(set(forward)) > 10


def test_sample_does_not_change_its_input() -> None:
    logits = torch.tensor([1.0, NAN, 2.0])
    sample(logits, SamplingParams(top_k=1), TokenRng(0))
    assert logits[[0, 2]].tolist() == [1.0, 2.0]
    assert logits[1].isnan()


# --- rows that are not numbers --------------------------------------------------------------------


def test_nan_counts_as_minus_infinity() -> None:
    logits = torch.tensor([NAN, 0.0, -INF, 0.0, NAN])
    assert filter_logits(logits, SamplingParams()).tolist() == [0, 0.5, 0, 0.5, 0]
    assert set(draws(logits, SamplingParams(), 50).nonzero()[0]) == {1, 3}


def test_plus_infinity_beats_everything() -> None:
    logits = torch.tensor([1e30, INF, NAN, INF, -INF])
    for params in (SamplingParams(), SamplingParams(temperature=1e-6)):
        assert filter_logits(logits, params).tolist() == [0, 0.5, 0, 0.5, 0]
    assert sample(logits, SamplingParams(temperature=0), TokenRng(0)) == 1


@pytest.mark.parametrize("bad", [NAN, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_number_is_refused(temperature: float, bad: float) -> None:
    for logits in (torch.full((5,), bad), torch.zeros(0)):
        with pytest.raises(RequestError, match="logits: expected at least one above -inf"):
            sample(logits, SamplingParams(temperature=temperature), TokenRng(0))


def test_logits_of_another_shape_or_dtype_are_refused() -> None:
    for logits in (torch.zeros(1, 5), torch.zeros(5, dtype=torch.int64)):
        with pytest.raises(RequestError, match=r"logits: expected a float vector \[V\]"):
            sample(logits, SamplingParams(), TokenRng(0))


VALUES = st.one_of(st.floats(width=32), st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0]))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=12),
    st.sampled_from([0.0, 5e-324, 1e-3, 0.7, 1.0, 50.0, 1e308]),
    st.integers(0, 15),
    st.sampled_from([1e-300, 0.1, 0.5, 0.999999, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.3, 1.0]),
    st.integers(0, 2**64 - 1),
)
def test_any_row_gives_a_legal_token_or_an_error(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if not any(v > -INF for v in values):
        with pytest.raises(RequestError):
            sample(logits, params, TokenRng(seed))
        return
    probs = filter_logits(logits, params)
    assert bool((probs >= 0).all())
    assert abs(float(probs.sum()) - 1) < 1e-12
    best = logits.nan_to_num(-INF, INF, -INF).argmax()
    assert probs[best] == probs.max() > 0
    assert probs.count_nonzero() <= (top_k or len(values))
    token = sample(logits, params, TokenRng(seed))
    assert probs[token] > 0


def test_the_extreme_random_numbers_stay_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-INF, 0.3, -1.7, 2.9, -INF])
    for u, want in ((0.0, 1), (1 - 2**-53, 3)):
        monkeypatch.setattr(TokenRng, "uniform", lambda self, u=u: u)
        for scale in (1.0, 0.77, 3.1):
            assert sample(logits * scale, SamplingParams(), TokenRng(0)) == want


# --- log probabilities ----------------------------------------------------------------------------


def test_logprobs_are_sorted_exact_and_untouched_by_parameters() -> None:
    ids, values = logprobs(LADDER, 5)
    assert ids.tolist() == [1, 3, 0, 2, 4]  # 2 before 4: equal, lower id first
    want = np.log(np.array([8, 4, 2, 1, 1]) / 16)
    np.testing.assert_allclose(values.numpy(), want, rtol=0, atol=1e-6)
    assert values.dtype == torch.float64
    top_ids, top_values = logprobs(LADDER, 2)
    assert top_ids.tolist() == [1, 3]
    assert top_values.tolist() == values[:2].tolist()
    full = log_probabilities(LADDER)
    assert full[ids].tolist() == values.tolist()
    assert abs(float(full.exp().sum()) - 1) < 1e-12


def test_logprobs_of_odd_rows() -> None:
    assert log_probabilities(torch.tensor([NAN, 0.0, -INF])).tolist() == [-INF, 0.0, -INF]
    for bad in (0, 6, 1.5, True):
        with pytest.raises(RequestError, match="k: expected an integer from 1 to 5"):
            logprobs(LADDER, bad)
    with pytest.raises(RequestError, match="logits: expected at least one above -inf"):
        logprobs(torch.tensor([NAN]), 1)
