"""What the interpreter cannot show of the sampler: full vocabulary, many draws, CUDA graphs."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.sampling import SamplingParams
from dsv4.ops import sampling as ops
from dsv4.reference.sampler import filter_logits
from dsv4.testing.cases.sampling import VOCAB, logit_rows, mixed_rows, request_rows
from dsv4.testing.numeric import assert_bits_equal
from support.draws import unexplained

pytestmark = pytest.mark.gpu
KINDS = ["peaked", "flat", "ties", "masked"]


def sampled(logits: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    return ops.sample(logits.cuda(), **{k: x.cuda() for k, x in rows.items()}).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_at_full_size(kind: str, dtype: torch.dtype) -> None:
    logits = logit_rows(64, VOCAB, kind, 1, dtype)
    logits[::3, 1000:50000] = float("nan")
    want = logits.float().nan_to_num(-torch.inf, torch.inf, -torch.inf).argmax(1)
    assert_bits_equal("ids", sampled(logits, request_rows(64, temperature=0)), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [{}, {"top_k": 50}, {"top_k": 5000}, {"top_p": 0.95}, {"top_p": 0.3}, {"min_p": 0.02}, None],
    ids=str,
)
def test_draws_at_full_size(given: dict[str, Any] | None, kind: str) -> None:
    """Rounding decides at most 1 draw of 100 here, and nothing else ever does."""
    logits = logit_rows(100, VOCAB, kind, 5)
    rows = mixed_rows(100, 2) if given is None else request_rows(100, 2, **given)
    differing, bad = unexplained(logits, sampled(logits, rows), rows)
    assert bad == 0
    assert differing <= 1


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1},
     {"top_k": 9, "top_p": 0.9, "min_p": 0.02}],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_distribution(given: dict[str, Any]) -> None:
    count, row = 40000, logit_rows(1, 16, "peaked", 3)
    rows = request_rows(1, **given)
    rows = {name: x.expand(count).contiguous() for name, x in rows.items()}
    rows["position"] = torch.arange(count)
    seen = sampled(row.expand(count, -1).contiguous(), rows).bincount(minlength=16)
    expected = count * filter_logits(row[0], SamplingParams(**given))
    live = expected > 0
    assert int(seen[~live].sum()) == 0
    chi_square = ((seen - expected)[live] ** 2 / expected[live]).sum()
    assert chi_square < 37.7  # p = 0.001 for 15 degrees of freedom, less for fewer


@pytest.mark.parametrize("kind", ["peaked", "flat"])
def test_a_row_depends_on_nothing_else(kind: str) -> None:
    """Alone, among 8 or among 300: other programs do other shares of the work."""
    logits, rows = logit_rows(300, VOCAB, kind, 6), mixed_rows(300, 3)
    many = sampled(logits, rows)
    for span in (slice(0, 1), slice(5, 6), slice(8, 16), slice(299, 300)):
        own = {name: x[span] for name, x in rows.items()}
        assert_bits_equal("ids", sampled(logits[span].clone(), own), many[span])
    assert_bits_equal("again", sampled(logits, rows), many)


def test_a_graph_replays_with_other_logits_and_parameters() -> None:
    logits = logit_rows(8, VOCAB, "peaked").cuda()
    rows = {k: x.cuda() for k, x in mixed_rows(8).items()}
    ops.sample(logits, **rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = ops.sample(logits, **rows)
    for seed in range(6):
        logits.copy_(logit_rows(8, VOCAB, KINDS[seed % 4], seed))
        for name, x in mixed_rows(8, seed).items():
            rows[name].copy_(x.roll(seed))
        graph.replay()
        assert_bits_equal("ids", static, ops.sample(logits, **rows))


def test_torch_compile_gives_the_same_ids() -> None:
    logits = logit_rows(4, 5000, "peaked").cuda()
    rows = {k: x.cuda() for k, x in mixed_rows(4).items()}
    compiled = torch.compile(lambda x: ops.sample(x, **rows), fullgraph=True)
    assert_bits_equal("ids", compiled(logits), ops.sample(logits, **rows))
