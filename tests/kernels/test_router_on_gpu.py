"""What the interpreter cannot show of the router kernels: full sizes, graphs, torch.compile."""

from functools import partial

import pytest
import torch

from dsv4.ops import router as ops
from dsv4.reference import routing as oracle
from dsv4.testing.cases.router import FLASH, NANO, PRO, SCALING, distinct_experts, hash_table
from dsv4.testing.cases.router import router_logits as logits_of
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("T", [1, 64, 1000, 8192, 32768])
@pytest.mark.parametrize(("E", "K"), [FLASH, PRO, NANO])
def test_choice_at_full_size(E: int, K: int, T: int) -> None:
    logits, bias = logits_of(T, E, seed=T)
    table = hash_table(129280, E, K)
    tokens = torch.randint(-1, 129280, (T,), generator=torch.Generator().manual_seed(T))
    for name, rest in (("router_topk", (bias, K, SCALING)), ("router_hash", (table, tokens, 2.5))):
        moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in rest]
        got = getattr(ops, name)(logits.cuda(), *moved)
        want = getattr(oracle, name)(logits, *rest)
        exact = getattr(oracle, name)(logits.double(), *rest)
        if name == "router_topk":
            # Two scores may lie closer together than any two roundings of softplus.
            differs = (got[0].cpu() != want[0]).any(1)
            assert int(differs.sum()) <= T // 4000
            assert torch.equal(got[0].cpu()[~differs], want[0][~differs])
            exact = oracle.router_topk(logits.double(), bias.double(), K, SCALING)
            same = (exact[0] == want[0]).all(1) & ~differs
            assert_as_exact_as("weights", got[1].cpu()[same], want[1][same], exact[1][same])
        else:
            assert_bits_equal("ids", got[0].cpu(), want[0])
            assert_as_exact_as("weights", got[1].cpu(), want[1], exact[1])


@pytest.mark.parametrize("block_size", [8, 64, 128])
@pytest.mark.parametrize("T", [1, 64, 171, 1000, 8192, 32768])
@pytest.mark.parametrize(("E", "K"), [FLASH, PRO])
def test_lists_at_full_size(E: int, K: int, T: int, block_size: int) -> None:
    experts = distinct_experts(T, E, K, seed=T)
    skewed = torch.where(torch.arange(T)[:, None] % 3 > 0, torch.arange(K), experts)
    for ids, span in ((experts, (0, E)), (skewed.int(), (0, E)), (experts, (E // 4, E // 8))):
        first, second = (ops.moe_align(ids.cuda(), *span, block_size) for _ in range(2))
        want = oracle.moe_align(ids, *span, block_size)
        for i, x in enumerate(want):
            assert_bits_equal(str(i), first[i].cpu(), x)
            assert_bits_equal(f"{i} again", second[i], first[i])


def test_a_graph_replays_with_other_routing() -> None:
    logits, bias = (x.cuda() for x in logits_of(64, 256))
    table, tokens = hash_table(1000, 256, 6).cuda(), torch.zeros(64, dtype=torch.int64).cuda()

    def step() -> list[torch.Tensor]:
        chosen = ops.router_topk(logits, bias, 6, SCALING, tokens < 0)
        hashed = ops.router_hash(logits, table, tokens, SCALING)
        return [*chosen, *hashed, *ops.moe_align(chosen[0], 0, 256, 16)]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()
    for seed in range(5):
        logits.copy_(logits_of(64, 256, seed)[0])
        tokens.random_(-1, 1000)
        graph.replay()
        for name, x, y in zip(range(9), static, step(), strict=True):
            assert_bits_equal(str(name), x, y)


def test_padding_in_a_large_call() -> None:
    logits, bias = logits_of(8192, 256)
    is_padding = torch.arange(8192) % 3 == 1
    args = logits.cuda(), bias.cuda(), 6, SCALING
    ids, weights = ops.router_topk(*args, is_padding.cuda())
    plain_ids, plain_weights = ops.router_topk(*args)
    live = ~is_padding.cuda()[:, None]
    assert_bits_equal("ids", ids, torch.where(live, plain_ids, -1))
    assert_bits_equal("weights", weights, torch.where(live, plain_weights, 0))


def test_torch_compile_gives_the_same_bits() -> None:
    logits, bias = (x.cuda() for x in logits_of(300, 256))
    plain = partial(ops.router_topk, logits, bias, 6, SCALING)
    for x, y in zip(plain(), torch.compile(plain, fullgraph=True)(), strict=True):
        assert_bits_equal("compiled", x, y)
