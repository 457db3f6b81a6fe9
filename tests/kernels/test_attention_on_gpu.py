"""The attention kernels at real sizes: heads of Flash and Pro, graphs, addresses beyond 2^31."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.attention import sparse_attn_decode as decode_kernel
from dsv4.kernels.attention import sparse_attn_decode_sm90 as decode_sm90
from dsv4.kernels.common.attention_checks import attention_shape
from dsv4.kernels.common.cuda import load
from dsv4.ops import attention as ops
from dsv4.reference import paged_attention as oracle
from dsv4.testing.cases.attention import AttentionCase, random_pages
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal
from support.real_sizes import ATTENTION_KINDS

pytestmark = pytest.mark.gpu

TILE = 64
OPS = ("sparse_attn_decode", "sparse_attn_prefill")
VARIANTS = ("first", "portable")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels that the device takes first, and those for any device."""
    if request.param == "portable":
        for name in ("SPARSE_ATTN_DECODE", "SPARSE_ATTN_PREFILL"):
            monkeypatch.setattr(ops, name, getattr(ops, name)[-1:])
    return request.param


def assert_right(name: str, args: dict[str, Any]) -> Tensor:
    got = getattr(ops, name)(**args)
    same = getattr(oracle, name)(**args)
    exact = getattr(oracle, name)(**args | {"q": args["q"].double()})
    assert_as_exact_as(name, got, same, exact)
    live = args["slot"] >= 0
    a, b = got[live].double().flatten(1), exact[live].flatten(1)
    assert (torch.cosine_similarity(a, b, dim=1) >= 0.99999).all()
    assert (got[~live] == 0).all()
    return got


@pytest.mark.parametrize("H", [8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_real_sizes(H: int, kind: str, variant: str) -> None:
    requests = ((3000, 3), (0, 2), (127, 1), (700, 1))
    args = AttentionCase(requests, H, 512, 128, padding=1, **ATTENTION_KINDS[kind]).args("cuda")
    got = [assert_right(name, args) for name in OPS]
    assert_bits_equal("prefill and decode", *got)


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 17, 34])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_tile_boundaries(tiles: int, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = tiles * TILE + extra
    args = AttentionCase(((count - 1, 1),), 64, 512, 128, 1, 64).args("cuda")
    got = assert_right("sparse_attn_decode", args)
    monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", 0)
    assert_bits_equal("groups", ops.sparse_attn_decode(**args), got)
    if tiles < decode_kernel.GROUP:
        assert_bits_equal("prefill", ops.sparse_attn_prefill(**args), got)


@pytest.mark.parametrize("B", [1, 40])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_the_bits_of_eager_calls(name: str, B: int, variant: str) -> None:
    first, second = (
        AttentionCase([(2000 + i, 1)] * B, 64, 512, 128, topk=512, per_page=64, seed=i).args("cuda")
        for i in range(2)
    )
    want = [getattr(ops, name)(**args) for args in (first, second)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = getattr(ops, name)(**first)
    for args, expected in ((first, want[0]), (second, want[1]), (second, want[1])):
        for k, x in args.items():
            if isinstance(x, Tensor):
                first[k].copy_(x)
        graph.replay()
        if args is second:
            assert_bits_equal("replay", out, expected)


@pytest.mark.parametrize("H", [16, 64, 128])
def test_a_token_does_not_see_its_neighbours(H: int, variant: str) -> None:
    """Alone in a step, as one of 3, as one of 80: the programs take tiles or groups."""
    case = AttentionCase([(900 + 7 * i, 1) for i in range(80)], H, 512, 128, topk=512, per_page=64)
    args = case.args("cuda")
    many = ops.sparse_attn_decode(**args)
    size = KvRecord().data_bytes
    data, scales = args["step"].split((80 * size, len(args["step"]) - 80 * size))
    for rows in (slice(7, 8), slice(40, 43)):
        n = rows.stop - rows.start
        page = torch.cat(
            (data.view(80, -1)[rows].flatten(), scales[: 80 * 8].view(80, 8)[rows].flatten())
        )
        own = {k: args[k][rows] for k in ("q", "entries", "slot", "position", "cos", "sin")}
        own |= {"first_position": args["first_position"][rows]}
        own |= {"first_row": torch.arange(n, device="cuda")}
        own |= {"step": torch.nn.functional.pad(page, (0, -len(page) % size))}
        assert_bits_equal("rows", ops.sparse_attn_decode(**args | own), many[rows])


def test_runs_repeat_bit_for_bit(variant: str) -> None:
    args = AttentionCase([(3000, 200)], 64, 512, 128, topk=512, per_page=64).args("cuda")
    first = ops.sparse_attn_prefill(**args)
    for _ in range(5):
        assert_bits_equal("again", ops.sparse_attn_prefill(**args), first)


# Clusters of blocks, which combine their parts themselves

is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


TWO_KERNELS: dict[int, int] = {}
EITHER_SPLIT: tuple[dict[int, int], ...] = ({4: 1}, {2: 1})


def with_splits(args: dict[str, Any], splits: dict[int, int]) -> Tensor:
    """The result if these splits may be chosen; outputs and parts start as NaN."""
    out = decode_sm90.outputs(**args)
    for x in out:
        x.fill_(float("nan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_sm90, "SPLITS", splits)
        shape = attention_shape(
            *(args[k] for k in ("q", "page_table", "entries", "rope_dim", "entries_per_page"))
        )
        tiles, _ = decode_kernel.tiles_of(shape, args["rows"])
        takes_clusters = decode_sm90.clusters(shape, tiles, args["q"].device) is not None
        decode_sm90.launch(**args, out=out)
    assert out[1].numel() > 0
    assert out[1].isnan().all() == takes_clusters, "the other way was taken"
    if len(splits) == 1 and len(args["q"]) == 1 and args["q"].shape[1] <= 64:
        assert takes_clusters == (tiles <= 16 or (tiles <= 32 and 4 in splits))
    return out[0]


def listed_tiles(tiles: int, requests: int, H: int, padding: int = 0) -> dict[str, Any]:
    """Requests of full lists and of shorter ones; windows have 2 tiles."""
    lengths = [(tiles * TILE * 2 // (1 + i % 3), 1) for i in range(requests)]
    topk = max(0, tiles - 2) * TILE
    case = AttentionCase(lengths, H, 512, 128, 1, 64, topk, padding, seed=tiles)
    return case.args("cuda")


def by_triton(name: str, args: dict[str, Any]) -> Tensor:
    """The result of the kernel for any device."""
    kernel = getattr(ops.kernels, name)
    out = kernel.outputs(**args)
    kernel.launch(**args, out=out)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.skipif(not is_hopper, reason="clusters are of the kernel for Hopper")
@pytest.mark.parametrize("tiles", [*range(2, 20), 25, 31, 32, 33])
@pytest.mark.parametrize("H", [8, 64])
def test_clusters_give_the_bits_of_two_kernels(tiles: int, H: int) -> None:
    args = listed_tiles(tiles, 1, H)
    want = with_splits(args, TWO_KERNELS)
    for splits in EITHER_SPLIT:
        assert_bits_equal(f"{splits}", with_splits(args, splits), want)
    if tiles <= decode_kernel.GROUP:
        assert_bits_equal("prefill", ops.sparse_attn_prefill(**args), want)


@pytest.mark.skipif(not is_hopper, reason="clusters are of the kernel for Hopper")
@pytest.mark.parametrize("T", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("H", [8, 33, 64, 96, 128])
@pytest.mark.parametrize("kind", [*ATTENTION_KINDS, "short lists"])
def test_clusters_of_any_step(T: int, H: int, kind: str) -> None:
    """Lists of all lengths, tokens without keys, padding: blocks without a tile take part."""
    if kind == "short lists":
        args = listed_tiles(10, T, H, padding=1)
    else:
        requests = ((3000, 1), (0, 1), (127, 1), (700, 1), (2047, 1), (64, 2))[:T]
        args = AttentionCase(requests, H, 512, 128, padding=1, **ATTENTION_KINDS[kind]).args("cuda")
    args["position"][-2] = -1 if T > 2 else args["position"][-2]
    want = with_splits(args, TWO_KERNELS)
    exact = oracle.sparse_attn_decode(**args | {"q": args["q"].double()})
    assert_as_exact_as("Triton", want, by_triton("sparse_attn_decode", args), exact)
    for splits in (*EITHER_SPLIT, decode_sm90.SPLITS):
        for _ in range(3):
            assert_bits_equal(f"{splits}", with_splits(args, splits), want)


@pytest.mark.skipif(not is_hopper, reason="clusters are of the kernel for Hopper")
def test_one_token_is_a_matter_of_clusters() -> None:
    """What is measured: the list of 512 and the window in 4 clusters of 10 blocks."""
    args = listed_tiles(10, 1, 64)
    shape = attention_shape(args["q"], args["page_table"], args["entries"], 64, 64)
    assert decode_sm90.clusters(shape, 10, args["q"].device) == (1, 10, 4)
    first = with_splits(args, decode_sm90.SPLITS)
    for _ in range(10):
        assert_bits_equal("again", with_splits(args, decode_sm90.SPLITS), first)


@pytest.mark.skipif(not is_hopper, reason="clusters are of the kernel for Hopper")
@pytest.mark.parametrize("splits", EITHER_SPLIT)
def test_nan_passes_through_clusters(splits: dict[int, int]) -> None:
    args = listed_tiles(10, 1, 64)
    args["step"][576] = 0xFF  # the scale of the token's own first group
    got = with_splits(args, splits)
    assert got.isnan().all()
    assert_bits_equal("two kernels", got, with_splits(args, TWO_KERNELS))


@pytest.mark.skipif(not is_hopper, reason="clusters are of the kernel for Hopper")
@pytest.mark.parametrize("H", [16, 64, 128])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_zeros_of_tokens_without_keys_are_those_of_triton(
    H: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero times a sine has a sign. Two clusters, two kernels, one program for all, prefill."""
    case = AttentionCase(((3000, 1),), H, 512, 128, padding=1, **ATTENTION_KINDS[kind])
    args = case.args("cuda")
    args["position"][0] = -1
    angles = torch.linspace(0, 6.2, 32, device="cuda").expand_as(args["cos"])
    args |= {"cos": angles.cos().contiguous(), "sin": angles.sin().contiguous()}
    for signs in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        turned = args | {k: s * args[k] for k, s in zip(("cos", "sin"), signs, strict=True)}
        want = by_triton("sparse_attn_decode", turned)
        assert (want == 0).all()
        for splits in (*EITHER_SPLIT, TWO_KERNELS):
            assert_bits_equal(f"{splits}", with_splits(turned, splits), want)
        assert_bits_equal("prefill", ops.sparse_attn_prefill(**turned), want)
        assert_bits_equal("Triton", by_triton("sparse_attn_prefill", turned), want)
        with monkeypatch.context() as patch:
            patch.setattr(decode_kernel, "FEW_PROGRAMS", 0)
            assert_bits_equal("groups", ops.sparse_attn_decode(**turned), want)


@pytest.mark.skipif(not is_hopper, reason="such blocks are of the kernel for Hopper")
@pytest.mark.parametrize("H", [16, 70, 128])
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize(("name", "few"), [(OPS[0], 0), (OPS[0], 1 << 30), (OPS[1], 0)])
def test_blocks_that_go_on_give_the_same_bits(
    name: str, few: int, H: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More programs than SMs, of all lengths; some tokens have no keys, the first parts no tiles.

    few  below that many groups of tiles a program of decode has one tile: never or always
    """
    monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", few)
    requests = ((0, 10), (3000, 150), (100, 80), (0, 190))
    args = AttentionCase(requests, H, 512, 128, padding=9, **ATTENTION_KINDS[kind]).args("cuda")
    args["position"][40:43], args["slot"][:3] = -1, -1
    module = getattr(ops.kernels, f"{name}_sm90")

    def result() -> Tensor:
        out = module.outputs(**args)
        parts = out if isinstance(out, tuple) else (out,)
        for x in parts:
            x.fill_(float("nan"))
        module.launch(**args, out=out)
        return parts[0]

    kernel = load(decode_sm90.source(False), args["q"].device, decode_sm90.CONFIG["shared_bytes"])
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "num_sms", 1 << 30)  # a block for each
        want = result()
    assert want.isfinite().all()
    for _ in range(5):
        assert_bits_equal("going on", result(), want)


@pytest.mark.skipif(not is_hopper, reason="such blocks are of the kernel for Hopper")
def test_more_groups_of_tiles_than_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """38 tiles a token, 32 and 6 of them in a program, or one in each."""
    requests = ((128 * 2300 - 1, 1),) * 70
    args = AttentionCase(requests, 128, 512, 128, padding=1, **ATTENTION_KINDS["hca"]).args("cuda")
    found = []
    for few in (0, 1 << 30):
        monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", few)
        found.append(ops.sparse_attn_decode(**args))
    assert found[0].isfinite().all()
    assert_bits_equal("one tile in each", found[1], found[0])


@pytest.mark.parametrize("H", [16, 64])
def test_addresses_beyond_two_gigabytes(H: int) -> None:
    args = AttentionCase(((255, 1),), H, 512, 128, per_page=64).args("cuda")
    record, count = KvRecord(), 2**31 // KvRecord().page_bytes(64) + 3
    pages = torch.full((count, record.page_bytes(64)), 0xFF, dtype=torch.uint8, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    pages[-1:] = random_pages(record, 1, 64, g, "cuda")
    args["pages"], args["page_table"] = pages, torch.full((2, 1), count - 1, device="cuda").int()
    for name in OPS:
        assert_right(name, args)
