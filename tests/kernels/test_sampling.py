"""The sampler: greedy bit for bit, drawn ids those of the oracle save where rounding decides."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.sampling import MAX_SEED
from dsv4.kernels.sampling import sample as kernel
from dsv4.ops import sampling as ops
from dsv4.reference import sampling as oracle
from dsv4.reference.sampler import TokenRng
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.sampling import logit_rows, mixed_rows, request_rows
from dsv4.testing.numeric import assert_bits_equal
from support.draws import unexplained

INF, NAN = float("inf"), float("nan")
TILE = 256  # small, so that a row of several tiles is quick


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.CONFIG, "TILE", TILE)


def sampled(logits: Tensor, **rows: Any) -> Tensor:
    """What `launch` leaves when everything it writes to held NaN or nonsense."""
    given = {k: x.to(DEVICE) for k, x in rows.items()}
    args = {"logits": logits.to(DEVICE), **dict.fromkeys(("top_k", "top_p", "min_p")), **given}
    out = kernel.outputs(**args)
    for x in out:
        x.fill_(NAN if x.is_floating_point() else 0x7F7F7F7F)
    kernel.launch(**args, out=out)
    return out[0].cpu()


def assert_same_draws(logits: Tensor, allowed: int = 0, **rows: Any) -> None:
    differing, bad = unexplained(logits, sampled(logits, **rows), rows)
    assert bad == 0
    assert differing <= allowed


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, TILE - 1, TILE, TILE + 1, 3 * TILE + 7])
def test_greedy_equals_the_oracle(V: int, dtype: torch.dtype) -> None:
    logits = torch.cat([logit_rows(3, V, kind, V, dtype) for kind in ("flat", "ties", "equal")])
    rows = request_rows(9, temperature=0)
    got = sampled(logits, **rows)
    assert_bits_equal("ids", got, oracle.sample(logits, **rows))
    assert_bits_equal("argmax", got, logits.argmax(1))


def test_greedy_ties_go_to_the_lower_id_across_tiles_and_signs_of_zero() -> None:
    logits = torch.full((4, 3 * TILE), -1.0)
    logits[0, [TILE - 1, TILE, 2 * TILE + 5]] = 7.0
    logits[1, [TILE + 3, TILE + 2]] = torch.tensor([0.0, -0.0])
    logits[2, [2 * TILE, 2 * TILE + 1]] = INF
    logits[3, 0], logits[3, 3 * TILE - 1] = NAN, -0.5
    got = sampled(logits, **request_rows(4, temperature=0))
    assert got.tolist() == [TILE - 1, TILE + 2, 2 * TILE, 3 * TILE - 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_row_without_a_number_gives_zero(bad: float, temperature: float) -> None:
    logits = torch.full((3, TILE + 10), bad)
    logits[1, TILE + 3] = -1e30
    rows = request_rows(3, temperature=temperature, top_k=4, top_p=0.5, min_p=0.1)
    assert sampled(logits, **rows).tolist() == [0, TILE + 3, 0]
    plain = request_rows(3, temperature=temperature)
    assert sampled(logits, **plain).tolist() == [0, TILE + 3, 0]


# Draws


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_draws_equal_the_oracle(kind: str, dtype: torch.dtype) -> None:
    logits = logit_rows(15, 2 * TILE + 100, kind, 1, dtype)
    rows = request_rows(15, seed=2)
    rows["temperature"] = torch.tensor([0.3, 1.0, 5.0]).repeat(5)
    assert_same_draws(logits, **rows)


@pytest.mark.parametrize("kind", ["peaked", "flat", "ties", "equal", "masked"])
@pytest.mark.parametrize(
    "given",
    [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.7, "min_p": 0.01}],
    ids=str,
)
def test_filtered_draws_equal_the_oracle(given: dict[str, Any], kind: str) -> None:
    logits = logit_rows(3, TILE + 200, kind, 4)
    assert_same_draws(logits, **request_rows(3, seed=3, **given))


def test_greedy_and_random_rows_mix() -> None:
    logits = torch.cat([logit_rows(6, 700, kind, 6) for kind in ("peaked", "flat", "ties")])
    assert_same_draws(logits, **mixed_rows(18, seed=5))


@pytest.mark.parametrize("V", [1, 2, 37])
def test_small_vocabularies_with_values_that_are_no_numbers(V: int) -> None:
    g = torch.Generator().manual_seed(V)
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e-40, 1.0, 1.0])
    logits = special[torch.randint(0, 10, (24, V), generator=g)]
    logits[:12] = torch.where(logits[:12] == INF, 2.0, logits[:12])
    assert_same_draws(logits, **mixed_rows(24, seed=V))


def test_extreme_temperatures() -> None:
    logits = logit_rows(6, 300, "ties", 8)
    rows = request_rows(6, seed=1, top_p=0.9)
    rows["temperature"] = torch.tensor([1e-45, 1e-30, 1e-3, 50.0, 1e10, 3e38])
    assert_same_draws(logits, **rows)


def test_the_kept_set_is_exact() -> None:
    """Every boundary of top-k, one by one, ties and the tile edge included."""
    logits = logit_rows(1, TILE + 20, "ties", 9)
    logits[0, [3, TILE - 1, TILE, TILE + 5]] = 11.0
    order = logits[0].argsort(descending=True, stable=True)
    for k in (1, 4, 9):
        # A high temperature makes all that are kept equally likely.
        rows = request_rows(8, seed=k, temperature=1e6, top_k=k)
        ids = sampled(logits.expand(8, -1).contiguous(), **rows).tolist()
        assert set(ids) <= set(order[:k].tolist())
        assert len(set(ids)) > (1 if k > 1 else 0)


def test_random_numbers_are_those_of_the_oracle() -> None:
    """Of 1024 equal logits the id is the first ten bits of the random number."""
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    positions = [0, 1, 2**32 - 1, 2**32, 2**40 + 17, 2**62]
    rows = {
        "temperature": torch.ones(36),
        "seed": torch.tensor(seeds).repeat_interleave(6),
        "position": torch.tensor(positions).repeat(6),
    }
    got = sampled(torch.zeros(36, 1024), **rows).tolist()
    pairs = [(s & MAX_SEED, t) for s in seeds for t in positions]
    assert got == [int(TokenRng(s, t).uniform() * 1024) for s, t in pairs]


def test_filters_that_do_nothing_change_nothing() -> None:
    logits = logit_rows(8, 2 * TILE, "peaked", 2)
    plain = request_rows(8, seed=4)
    idle = request_rows(8, seed=4, top_k=0, top_p=1.0, min_p=0.0)
    assert_bits_equal("ids", sampled(logits, **idle), sampled(logits, **plain))
    all_of_them = request_rows(8, seed=4, top_k=2 * TILE)
    assert_bits_equal("ids", sampled(logits, **all_of_them), sampled(logits, **plain))


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits, rows = logit_rows(9, TILE + 300, "peaked", 7), mixed_rows(9, seed=7)
    many = sampled(logits, **rows)
    for b in (1, 7):
        own = {name: x[b : b + 1] for name, x in rows.items()}
        assert_bits_equal("id", many[b : b + 1], sampled(logits[b : b + 1].clone(), **own))


def test_illegal_parameters_never_leave_the_vocabulary() -> None:
    wrong = [NAN, -1.0, INF, -INF, 0.0, 2.0]
    logits = logit_rows(6, 500, "peaked", 3)
    for name in ("temperature", "top_p", "min_p"):
        rows = request_rows(6, top_k=50, top_p=0.9, min_p=0.01)
        rows[name] = torch.tensor(wrong)
        got = sampled(logits, **rows)
        assert bool(((got >= 0) & (got < 500)).all())
    rows = request_rows(6, top_k=50)
    rows["top_k"] = torch.tensor([-1, -(2**31), 2**31 - 1, 500, 501, 499], dtype=torch.int32)
    got = sampled(logits, **rows)
    assert bool(((got >= 0) & (got < 500)).all())


# Contracts


def test_an_empty_batch() -> None:
    assert sampled(torch.zeros(0, 50), **request_rows(0)).shape == (0,)


def test_op_contract() -> None:
    logits = logit_rows(2, 64).to(DEVICE)
    for rows in (request_rows(2), mixed_rows(2)):
        given = {k: x.to(DEVICE) for k, x in rows.items()}
        torch.library.opcheck(ops.sample.op, (logits,), given)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        ("logits", torch.zeros(3, 8).double(), "logits: expected torch.float32 or torch.bfloat16"),
        ("logits", torch.zeros(3, 0), "logits: expected at least one column"),
        ("logits", torch.zeros(8, 3).T, "logits: expected a contiguous tensor"),
        ("temperature", torch.ones(4), r"temperature: expected shape \[B\]"),
        ("seed", torch.ones(3), "seed: expected torch.int64"),
        ("position", torch.ones(3).int(), "position: expected torch.int64"),
        ("top_k", torch.ones(3).long(), "top_k: expected torch.int32"),
        ("top_p", torch.ones(2), r"top_p: expected shape \[B\]"),
        ("min_p", torch.ones(3).double(), "min_p: expected torch.float32"),
    ],
)
def test_bad_arguments_are_named(name: str, bad: Tensor, match: str) -> None:
    args = {"logits": logit_rows(3, 8), **mixed_rows(3), name: bad}
    with pytest.raises(ValueError, match=match):
        ops.sample(**{k: x.to(DEVICE) for k, x in args.items()})
