"""Router kernels: ids and lists equal the oracle's, weights are as exact, all stay in range."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.kernels.router import moe_align, router_hash, router_topk
from dsv4.ops import router as ops
from dsv4.reference import routing as oracle
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.router import (
    FLASH,
    NANO,
    PRO,
    SCALING,
    distinct_experts,
    hash_table,
    router_logits,
)
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

INF, NAN = float("inf"), float("nan")
SIZES = [FLASH, PRO, NANO, (13, 3), (5, 5), (1, 1)]


def launched(kernel: ModuleType, *args: Any) -> tuple[Tensor, ...]:
    """What `launch` leaves in outputs that held NaN, or bytes that are no index."""
    out = kernel.outputs(*args)
    for x in out:
        x.fill_(NAN if x.is_floating_point() else 0x7F7F7F7F)
    kernel.launch(*args, out)
    return out


def assert_choice(got: tuple[Tensor, ...], args: tuple[Any, ...], name: str) -> None:
    """ids bit for bit, weights with at most twice the error of PyTorch."""
    want = getattr(oracle, name)(*args)
    exact = getattr(oracle, name)(args[0].double(), *args[1:])
    got = tuple(x.cpu() for x in got)
    assert_bits_equal("ids", got[0], want[0])
    assert_as_exact_as("weights", got[1], want[1], exact[1])


def on_device(*args: Any) -> tuple[Any, ...]:
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in args)


# Scores


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize(("E", "K"), SIZES)
def test_topk_equals_the_oracle(E: int, K: int, T: int) -> None:
    args = *router_logits(T, E, seed=E + T), K, SCALING, None
    assert_choice(launched(router_topk, *on_device(*args)), args, "router_topk")


@pytest.mark.parametrize(("E", "K"), [NANO, (13, 3), (1, 1)])
def test_topk_gives_padding_no_expert(E: int, K: int) -> None:
    logits, bias = router_logits(7, E)
    logits[[1, 6]] = NAN
    is_padding = torch.tensor([0, 1, 0, 0, 1, 0, 1]).bool()
    args = logits, bias, K, SCALING, is_padding
    ids, weights = launched(router_topk, *on_device(*args))
    assert_choice((ids, weights), args, "router_topk")
    assert (ids[[1, 4, 6]] == -1).all()
    assert (weights[[1, 4, 6]] == 0).all()
    plain = launched(router_topk, *on_device(*args[:4], None))
    for name, x, y in zip(("ids", "weights"), (ids, weights), plain, strict=True):
        assert_bits_equal(name, x[[0, 2, 3, 5]], y[[0, 2, 3, 5]])


def test_topk_breaks_ties_by_the_lower_id() -> None:
    logits = torch.randint(-1, 2, (40, 256), generator=torch.Generator().manual_seed(0)).float()
    bias = torch.tensor([0.0, 0.25]).repeat(128)
    args = logits, bias, 6, 2.5, None
    assert_choice(launched(router_topk, *on_device(*args)), args, "router_topk")
    ids, _ = ops.router_topk(*on_device(torch.zeros(2, 16), torch.zeros(16), 6, 1.0))
    assert ids.tolist() == [list(range(6))] * 2


def test_topk_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.zeros(16)
    bias[9] = -100.0
    bias[3] = 100.0
    logits = torch.zeros(1, 16)
    logits[0, 9] = 50.0
    ids, weights = ops.router_topk(*on_device(logits, bias, 2, 3.0))
    assert ids.tolist() == [[3, 0]]
    assert weights.tolist() == [[1.5, 1.5]]


def test_affinity_is_exact_from_one_end_to_the_other() -> None:
    """Relative to each value, not to the largest: small affinities keep their digits."""
    x = torch.cat(
        (torch.linspace(-87, 60, 151), torch.tensor([-30.0, -3, 0, 1, 25, 20, 1e4, -0.0]))
    )
    pairs = torch.stack((x, torch.zeros_like(x)), dim=1)
    args = pairs, torch.zeros(2), 2, 1.0
    ids, weights = (y.cpu() for y in ops.router_topk(*on_device(*args)))
    first, second = (weights.gather(1, (ids == e).int().argmax(1, keepdim=True)) for e in (0, 1))
    got = (first.double() / second.double())[:, 0]
    exact = torch.nn.functional.softplus(pairs.double(), threshold=700).sqrt()
    want = exact[:, 0] / exact[:, 1]
    assert float((got / want - 1).abs().max()) < 6e-7
    table = {-30.0: 3.0590e-7, -3.0: 0.2204254, 1.0: 1.1459763, 25.0: 5.0}
    for value, score in table.items():
        ratio = float(got[151:][x[151:] == value][0])
        assert ratio == pytest.approx(score / 0.8325546, rel=2e-5)


def test_topk_of_no_numbers_stays_in_range_and_shows() -> None:
    g = torch.Generator().manual_seed(1)
    negative = torch.tensor(NAN).copysign(torch.tensor(-1.0))  # its bits order below all numbers
    special = torch.tensor([NAN, INF, -INF, 0.0, -1e30, 1e30, 3.0, negative])
    logits = special[torch.randint(0, 8, (60, 16), generator=g)]
    logits[0], logits[1], logits[2] = NAN, -INF, INF
    logits[3] = torch.randn(16, generator=g)
    args = logits, torch.randn(16, generator=g), 6, 1.5, None
    ids, weights = (x.cpu() for x in launched(router_topk, *on_device(*args)))
    want, want_weights = oracle.router_topk(*args)
    assert_bits_equal("ids", ids, want)
    assert torch.equal(weights.isnan(), want_weights.isnan())
    assert bool(weights[0].isnan().all())
    assert bool(weights[3].isfinite().all())


@pytest.mark.parametrize("T", [9, 100])
def test_topk_is_batch_invariant(T: int) -> None:
    logits, bias = on_device(*router_logits(T, 32))
    many = ops.router_topk(logits, bias, 6, SCALING)
    for t in (0, 5, T - 1):
        alone = ops.router_topk(logits[t : t + 1].clone(), bias, 6, SCALING)
        for name, x, y in zip(("ids", "weights"), many, alone, strict=True):
            assert_bits_equal(name, x[t : t + 1], y)


# Hash


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("T", [0, 1, 19])
@pytest.mark.parametrize(("E", "K"), SIZES)
def test_hash_equals_the_oracle(E: int, K: int, T: int, dtype: torch.dtype) -> None:
    logits, _ = router_logits(T, E, seed=T)
    tokens = torch.randint(0, 50, (T,), generator=torch.Generator().manual_seed(T))
    args = logits, hash_table(50, E, K).to(dtype), tokens, SCALING
    assert_choice(launched(router_hash, *on_device(*args)), args, "router_hash")


def test_hash_gives_padding_no_expert() -> None:
    logits, _ = router_logits(6, 16)
    logits[[1, 4]] = NAN
    tokens = torch.tensor([3, -1, 0, 49, 50, 1 << 40])
    args = logits, hash_table(50, 16, 6), tokens, SCALING
    ids, weights = launched(router_hash, *on_device(*args))
    assert_choice((ids, weights), args, "router_hash")
    assert (ids[[1, 4, 5]] == -1).all()
    assert (weights[[1, 4, 5]] == 0).all()


def test_hash_is_batch_invariant() -> None:
    logits, _ = router_logits(33, 256)
    table, tokens = hash_table(64, 256, 6), torch.arange(33)
    many = ops.router_hash(*on_device(logits, table, tokens, SCALING))
    alone = ops.router_hash(*on_device(logits[20:21], table, tokens[20:21], SCALING))
    for name, x, y in zip(("ids", "weights"), many, alone, strict=True):
        assert_bits_equal(name, x[20:21], y)


# Lists

ALIGN_NAMES = "rows", "offsets", "block_expert", "block_start", "num_blocks"


def assert_lists(experts: Tensor, *args: int) -> None:
    got = launched(moe_align, experts.to(DEVICE), *args)[:5]
    want = oracle.moe_align(experts, *args)
    for name, x, y in zip(ALIGN_NAMES, got, want, strict=True):
        assert_bits_equal(name, x.cpu(), y)


@pytest.mark.parametrize("block_size", [1, 16, 64])
@pytest.mark.parametrize("T", [0, 1, 8, 64])
@pytest.mark.parametrize(("E", "K"), [FLASH, PRO, NANO, (13, 3)])
def test_lists_equal_the_oracle(E: int, K: int, T: int, block_size: int) -> None:
    if E < 256 or block_size == 16 or T == 8:
        assert_lists(distinct_experts(T, E, K, seed=T), 0, E, block_size)


@pytest.mark.parametrize("T", [511, 512, 513, 2500])
def test_lists_of_several_chunks_equal_the_oracle(T: int) -> None:
    assert_lists(distinct_experts(T, 30, 1, seed=T), 0, 30, 16)


@pytest.mark.parametrize(
    ("T", "first", "num"), [(5, 0, 8), (5, 8, 8), (5, 3, 1), (5, 16, 4), (200, 8, 5)]
)
def test_lists_of_resident_experts(T: int, first: int, num: int) -> None:
    experts = distinct_experts(T, 16, 6, seed=T)
    experts[T // 2] = -1  # padding
    assert_lists(experts, first, num, 4)


@pytest.mark.parametrize("T", [20, 600])
def test_lists_of_one_expert_keep_the_order_of_rows(T: int) -> None:
    experts = torch.full((T, 1), 5, dtype=torch.int32)
    assert_lists(experts, 0, 8, 16)
    rows, offsets, *_ = ops.moe_align(experts.to(DEVICE), 0, 8, 16)
    assert rows.tolist() == list(range(T))
    assert offsets.tolist() == [0] * 6 + [T] * 3


def test_lists_cover_every_row_once_in_blocks_of_one_expert() -> None:
    """From the definition, without the oracle."""
    experts, block = distinct_experts(150, 32, 6), 8
    rows, offsets, owner, start, num = (x.tolist() for x in ops.moe_align(
        experts.to(DEVICE), 0, 32, block))  # fmt: skip
    seen = []
    for e, first in zip(owner[: num[0]], start[: num[0]], strict=True):
        mine = rows[first : min(first + block, offsets[e + 1])]
        assert 0 < len(mine) <= block
        assert {int(experts.flatten()[r]) for r in mine} == {e}
        seen += mine
    assert sorted(seen) == list(range(900))
    assert set(owner[num[0] :]) | set(start[num[0] :]) <= {-1}
    for e in range(32):
        mine = rows[offsets[e] : offsets[e + 1]]
        assert mine == sorted(mine)


@pytest.mark.parametrize(("rows", "experts", "block"), [(6, 256, 16), (384, 256, 16), (100, 2, 64)])
def test_capacity_is_reached_and_never_passed(rows: int, experts: int, block: int) -> None:
    want = oracle.moe_align_capacity(rows, experts, block)
    assert moe_align.moe_align_capacity(rows, experts, block) == want
    # The worst case: every expert one row over a full block.
    hit = min(rows, experts)
    counts = [1 + (rows - hit) // block // hit * block for _ in range(hit)]
    counts[0] += rows - sum(counts)
    assert sum(-(-n // block) for n in counts) <= want


# Contracts


def test_op_contracts() -> None:
    logits, bias = on_device(*router_logits(3, 16))
    torch.library.opcheck(ops.router_topk.op, (logits, bias, 6, SCALING))
    padding = torch.tensor([False, True, False], device=DEVICE)
    torch.library.opcheck(ops.router_topk.op, (logits, bias, 6, SCALING, padding))
    table, tokens = on_device(hash_table(9, 16, 6), torch.tensor([1, -1, 8]))
    torch.library.opcheck(ops.router_hash.op, (logits, table, tokens, SCALING))
    torch.library.opcheck(ops.moe_align.op, (distinct_experts(3, 16, 6, device=DEVICE), 0, 16, 4))


@pytest.mark.parametrize(
    ("op", "name", "bad", "match"),
    [
        ("router_topk", "logits", torch.zeros(3, 16).double(), "logits: expected torch.float32"),
        ("router_topk", "bias", torch.zeros(15), r"bias: expected shape \[E\]"),
        ("router_topk", "k", 0, "k: expected an integer >= 1"),
        ("router_topk", "k", 17, "k: expected at most 16 experts, got 17"),
        ("router_topk", "is_padding", torch.zeros(3), "is_padding: expected torch.bool"),
        ("router_topk", "is_padding", torch.zeros(4).bool(), r"is_padding: expected shape"),
        ("router_hash", "tid2eid", torch.zeros(9, 6), "tid2eid: expected torch.int32 or"),
        ("router_hash", "token_ids", torch.zeros(4).long(), r"token_ids: expected shape \[T\]"),
        ("moe_align", "experts", torch.zeros(3, 6).long(), "experts: expected torch.int32"),
        ("moe_align", "first_expert", -1, "first_expert: expected an integer >= 0"),
        ("moe_align", "num_experts", 0, "num_experts: expected an integer >= 1"),
        ("moe_align", "block_size", 0, "block_size: expected an integer >= 1"),
    ],
)
def test_bad_arguments_are_named(op: str, name: str, bad: Any, match: str) -> None:
    logits, bias = router_logits(3, 16)
    good: dict[str, dict[str, Any]] = {
        "router_topk": {"logits": logits, "bias": bias, "k": 6, "scaling": 1.0},
        "router_hash": {
            "logits": logits, "tid2eid": hash_table(9, 16, 6), "token_ids": torch.arange(3),
            "scaling": 1.0,
        },
        "moe_align": {
            "experts": distinct_experts(3, 16, 6), "first_expert": 0, "num_experts": 16,
            "block_size": 4,
        },
    }  # fmt: skip
    args = good[op] | {name: bad}
    args = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in args.items()}
    with pytest.raises(ValueError, match=match):
        getattr(ops, op)(**args)
