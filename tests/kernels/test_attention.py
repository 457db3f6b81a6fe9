"""dsv4.kernels.attention against dsv4.reference.paged_attention, on caches full of poison."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.kernels.attention import sparse_attn_decode as decode_kernel
from dsv4.kernels.attention import sparse_attn_decode_sm90 as decode_sm90
from dsv4.kernels.common import cuda
from dsv4.ops import attention as ops
from dsv4.reference import paged_attention as oracle
from dsv4.reference.kv_records import kv_page_pack, kv_page_unpack
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.attention import POISON, AttentionCase
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

# The interpreter warns where a sink overflows next to no keys at all.
pytestmark = [pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")]
pytestmark += [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16 = torch.bfloat16
OPS = ("sparse_attn_decode", "sparse_attn_prefill")
TILE = 64
FUZZ_EXAMPLES = int(os.environ.get("DSV4_FUZZ_EXAMPLES", "200"))
FUZZ_SHARDS = 1 if DEVICE == "cpu" else 14
ROWS = 1 if DEVICE == "cpu" else 3  # requests of a fuzzed step
MIXED = ((37, 1), (0, 3), (100, 5), (15, 1))
KINDS = {
    "csa": {"topk": 24, "ratio": 4, "per_page": 8},
    "hca": {"ratio": 16, "per_page": 2},
    "swa": {"ratio": 4096, "per_page": 1},
}


def run(name: str, args: dict[str, Any]) -> Tensor:
    return getattr(ops, name)(**args).cpu()


def assert_right(name: str, args: dict[str, Any]) -> Tensor:
    """Twice the oracle's BF16 error against FP64, and a cosine of 0.99999; -> what came out."""
    got = run(name, args)
    args = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in args.items()}
    same = getattr(oracle, name)(**args)
    exact = getattr(oracle, name)(**args | {"q": args["q"].double()})
    assert_as_exact_as(name, got, same, exact)
    rows = exact.flatten(1).norm(dim=1) > 0
    a, b = got.double().flatten(1)[rows], exact.flatten(1)[rows]
    assert (torch.cosine_similarity(a, b, dim=1) >= 0.99999).all()
    assert (got[~rows] == 0).all()
    return got


# Values


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle(name: str, kind: str) -> None:
    got = assert_right(name, AttentionCase(MIXED, padding=2, **KINDS[kind]).args(DEVICE))
    assert (got[-2:] == 0).all()  # padding


@pytest.mark.parametrize("H", [1, 8, 24, 32, 64, 128])
def test_heads(H: int) -> None:
    for name in OPS:
        assert_right(name, AttentionCase(((70, 2),), H, topk=9).args(DEVICE))


@pytest.mark.parametrize("C", [128, 256, 384, 512])
def test_head_dims(C: int) -> None:
    for name in OPS:
        assert_right(name, AttentionCase(((40, 2), (3, 1)), 8, C, topk=6).args(DEVICE))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128])
def test_window_sizes(rows: int) -> None:
    case = AttentionCase(((140, 2), (5, 1)), rows=rows, topk=4)
    for name in OPS:
        assert_right(name, case.args(DEVICE))


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_tile_boundaries(tiles: int, extra: int) -> None:
    """Lists that end a key before, on and after the end of a tile; programs of one and of all."""
    count = tiles * TILE + extra
    case = AttentionCase(((count - 1, 1),), rows=16, ratio=1, per_page=4)
    got = assert_right("sparse_attn_decode", case.args(DEVICE))
    listed = replace(case, topk=count).args(DEVICE)
    assert_bits_equal("entry list", run("sparse_attn_decode", listed), got)
    assert_bits_equal("prefill", run("sparse_attn_prefill", listed), got)


def test_every_tile_counts() -> None:
    """The same keys, four to a tile or all in one: equal up to rounding, and each one matters."""
    args = AttentionCase(((299, 1),), rows=16, ratio=1, per_page=4, topk=4).args(DEVICE)
    spread = torch.full((1, 4 * TILE), -1, device=DEVICE)
    spread[0, ::TILE] = args["entries"][0]
    got = run("sparse_attn_decode", args)
    apart = run("sparse_attn_decode", args | {"entries": spread})
    assert_as_exact_as("spread", apart, got, got.double())
    for i in range(4):
        without = spread.clone()
        without[0, i * TILE] = -1
        other = run("sparse_attn_decode", args | {"entries": without})
        assert (other - got).abs().max() > 0.05


@pytest.mark.parametrize("name", OPS)
def test_groups_of_tiles(name: str) -> None:
    """More than 32 tiles: decode adds groups."""
    case = AttentionCase(((34 * TILE + 4, 1),), 8, rows=16, ratio=1, per_page=64)
    assert_right(name, case.args(DEVICE))


@pytest.mark.parametrize("name", OPS)
def test_growing_logits_rescale_what_was_added(name: str) -> None:
    """Each tile has larger logits than the one before, then smaller ones."""
    args = AttentionCase(((4 * TILE - 1, 1),), rows=16, ratio=1, per_page=TILE).args(DEVICE)
    page = args["page_table"][0].cpu().tolist()
    scales = args["pages"][:, TILE * 192 : TILE * 200].unflatten(1, (TILE, 8))
    for order in ((0, 2, 4, 7), (7, 4, 2, 0)):
        for i, step in enumerate(order):
            scales[page[i], :, 0] = 115 + step
        assert_right(name, args)


@pytest.mark.parametrize("name", OPS)
def test_the_sink_is_not_scaled(name: str) -> None:
    args = AttentionCase(((60, 2),), topk=8).args(DEVICE)
    for scale in (0.01, 0.3):
        for sink in (-3.0, 4.0):
            args |= {"scale": scale, "sink": torch.full_like(args["sink"], sink)}
            assert_right(name, args)
    off = run(name, args | {"sink": torch.full_like(args["sink"], float("inf"))})
    assert (off == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_a_token_without_keys_gives_zeros(name: str) -> None:
    args = AttentionCase(((60, 2),), topk=8).args(DEVICE)
    args |= {"position": args["position"] * 0 - 1}
    for sink in (0.0, float("-inf")):
        got = run(name, args | {"sink": torch.full_like(args["sink"], sink)})
        assert (got == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_entries_are_not_dropped(name: str) -> None:
    """Entries change the result: attention never falls back to the window in silence."""
    for case in (AttentionCase(((60, 1),), topk=8), AttentionCase(((60, 1),))):
        args = case.args(DEVICE)
        none = torch.full((1, 8), -1, device=DEVICE)
        window_only = run(name, args | {"entries": none})
        assert (window_only - run(name, args)).abs().max() > 0.05


@pytest.mark.parametrize("name", OPS)
def test_entries_that_are_not_there_are_inert(name: str) -> None:
    """-1 anywhere, not yet visible, past the table, on the null page."""
    args = AttentionCase(((60, 1),), topk=8).args(DEVICE)
    chosen = args["entries"]
    want = run(name, args)
    for value in (-1, 15, 16, 2**30):
        holes = torch.full((1, 80), value, device=DEVICE)
        holes[:, :8] = chosen
        assert_bits_equal(f"{value} behind", run(name, args | {"entries": holes}), want)
    table = args["page_table"].clone()
    table[0, 1] = 0
    got = run(name, args | {"page_table": table})
    gone = torch.where((chosen // 8) == 1, -1, chosen)
    assert_bits_equal("null page", got, run(name, args | {"entries": gone}))
    short = args | {"entries": gone.to(torch.int32), "page_table": table}
    assert_bits_equal("int32", run(name, short), got)


def test_nan_records_reach_the_output() -> None:
    args = AttentionCase(((20, 1),), topk=2).args(DEVICE)
    args["step"][192] = POISON  # the scale of the token's own first group
    got = run("sparse_attn_decode", args)
    assert got.isnan().any()


# The same bits


def outputs_of_rows(args: dict[str, Any], name: str, rows: Sequence[int]) -> Tensor:
    """Only some tokens of a step; their records stay where they are in a page of fewer rows."""
    T, C = args["q"].shape[0], args["q"].shape[2]
    keep = torch.tensor(rows, device=DEVICE)
    own = {
        k: args[k][keep] if args[k] is not None else None
        for k in ("q", "entries", "slot", "position", "cos", "sin")
    }
    first = int(args["first_row"][keep[0]])
    records = slice(first, int(keep[-1]) + 1)
    num = records.stop - records.start
    data = args["step"][: T * (C + 64)].view(T, -1)[records].flatten()
    scales = args["step"][T * (C + 64) : T * (C + 72)].view(T, 8)[records].flatten()
    page = torch.cat((data, scales))
    own["step"] = torch.nn.functional.pad(page, (0, -len(page) % (C + 64)))
    assert num == len(rows)
    own["first_row"] = args["first_row"][keep] - first
    own["first_position"] = args["first_position"][keep]
    return run(name, args | own)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_see_its_neighbours(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, or beside others in so large a step that programs take more than one tile."""
    monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", 8)
    args = AttentionCase(((90, 1), *MIXED), 8, rows=70, padding=1, **KINDS[kind]).args(DEVICE)
    got = run(name, args)
    for rows in ([0], [2, 3, 4]):
        assert_bits_equal("rows", outputs_of_rows(args, name, rows), got[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_prefill_agree(kind: str) -> None:
    args = AttentionCase(((150, 1), *MIXED), rows=70, **KINDS[kind]).args(DEVICE)
    got = [run(name, args) for name in OPS]
    assert_bits_equal("decode", *got)


def test_programs_of_one_tile_and_of_many_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(((70 * TILE, 1), (200, 1)), 8, rows=70, ratio=2, per_page=64)
    args, got = case.args(DEVICE), []
    for few in (0, 1000):
        monkeypatch.setattr(decode_kernel, "FEW_PROGRAMS", few)
        got.append(run("sparse_attn_decode", args))
    assert_bits_equal("decode", *got)


@pytest.mark.parametrize("name", OPS)
def test_a_key_is_the_same_from_the_step_and_from_the_ring(name: str) -> None:
    """A chunk of 9 tokens, or its last one after the others were appended."""
    rows, C, n = 16, 128, 9
    args = AttentionCase(((40, n),), rows=rows, topk=8).args(DEVICE)
    got = run(name, args)
    window, size, step = args["window"].clone(), C + 64, args["step"]
    for i in range(n - 1):
        row = (40 + i) % rows
        window[0, row * size :][:size] = step[i * size :][:size]
        window[0, rows * size + row * 8 :][:8] = step[n * size + i * 8 :][:8]
    own = {k: args[k][-1:] for k in ("q", "entries", "slot", "position", "cos", "sin")}
    own |= {"window": window, "first_row": args["first_row"][:1] * 0}
    record = torch.cat((step[(n - 1) * size : n * size], step[n * size + (n - 1) * 8 :][:8]))
    own["step"] = torch.nn.functional.pad(record, (0, -len(record) % size))
    own["first_position"] = args["position"][-1:]
    assert_bits_equal("last token", run(name, args | own), got[-1:])
    # A ring that holds the token itself, as when it was appended first.
    row = (40 + n - 1) % rows
    window[0, row * size :][:size] = step[(n - 1) * size :][:size]
    window[0, rows * size + row * 8 :][:8] = step[n * size + (n - 1) * 8 :][:8]
    own |= {"step": torch.full_like(own["step"], POISON), "window": window}
    own["first_position"] = args["position"][-1:] + 1
    assert_bits_equal("appended first", run(name, args | own), got[-1:])


@pytest.mark.parametrize("name", OPS)
def test_every_output_is_written(name: str) -> None:
    """Results and partial results start as NaN."""
    module = getattr(ops.kernels, name)
    args = AttentionCase(MIXED[:2], 8, rows=70, topk=70, padding=1).args(DEVICE)
    out = module.outputs(**args)
    tensors = out if isinstance(out, tuple) else (out,)
    for x in tensors:
        x.fill_(float("nan"))
    module.launch(**args, out=out)
    assert_bits_equal("out", tensors[0].cpu(), run(name, args))


def test_division_by_multiplication() -> None:
    """What the kernel for Hopper does with entries and the size of a page."""
    n = torch.arange(1 << 19)
    for divisor in (1, 2, 3, 6, 32, 64, 96, 1000):
        magic = cuda.magic(divisor)
        assert -(2**31) <= magic < 2**31
        want = n // divisor
        assert torch.equal((n * (magic % 2**32)) >> 32 if magic else n, want)


# Clusters of a size that one H200 runs at once.
RESIDENT = {
    2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 7: 15, 8: 15, 9: 9, 10: 7, 11: 7, 12: 7, 13: 7, 14: 7, 15: 7,
    16: 7,
}  # fmt: skip


@pytest.mark.parametrize(
    ("programs", "tiles", "want"),
    [
        (1, 10, (1, 10, 4)), (2, 10, (1, 10, 2)), (3, 10, (1, 10, 2)), (4, 10, None),
        (1, 3, (1, 3, 4)), (8, 3, (1, 3, 4)), (9, 3, (1, 3, 4)), (10, 3, None), (16, 2, (1, 2, 4)),
        (17, 2, None), (3, 8, (1, 8, 4)), (4, 8, (1, 8, 2)), (7, 8, (1, 8, 2)), (8, 8, None),
        (4, 7, None), (1, 16, (1, 16, 4)), (3, 16, (1, 16, 2)), (1, 17, (2, 9, 4)),
        (2, 18, (2, 9, 4)), (3, 18, None), (1, 32, (2, 16, 4)), (2, 32, None),
    ],
)  # fmt: skip
def test_clusters_that_fit(programs: int, tiles: int, want: tuple[int, int, int] | None) -> None:
    """4 clusters a program where all run at once; else 2, where their blocks share the heads."""
    assert decode_sm90.plan_clusters(programs, tiles, RESIDENT.__getitem__) == want


@pytest.mark.parametrize(
    ("programs", "each", "parts", "split", "want"),
    [
        (130, 1, 10, 0, 130), (160, 1, 10, 0, 132), (439, 10, 1, 0, 132), (439, 32, 1, 0, 132),
        (320, 32, 5, 0, 320), (100, 32, 5, 0, 100), (240, 1, 10, 4, 240),
    ],
)  # fmt: skip
def test_which_blocks_go_on(programs: int, each: int, parts: int, split: int, want: int) -> None:
    assert decode_sm90.num_blocks(programs, 132, each, parts, split) == want


def test_without_splits_there_are_no_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """How the tests with a GPU choose the other way."""
    monkeypatch.setattr(decode_sm90, "SPLITS", {})
    assert decode_sm90.plan_clusters(1, 10, RESIDENT.__getitem__) is None
    monkeypatch.setattr(decode_sm90, "SPLITS", {2: 1})
    assert decode_sm90.plan_clusters(1, 2, RESIDENT.__getitem__) == (1, 2, 2)
    assert decode_sm90.plan_clusters(1, 17, RESIDENT.__getitem__) is None  # tiles of 4 alone


@pytest.mark.parametrize("is_fp8", [False, True])
def test_every_way_is_compiled_ahead(is_fp8: bool) -> None:
    module = getattr(ops.kernels, f"sparse_attn_decode{'_fp8' if is_fp8 else ''}_sm90")
    compiled = {made for made, _ in module.sources()}
    assert compiled == {decode_sm90.source(is_fp8, split) for split in (0, *decode_sm90.SPLITS)}


@pytest.mark.parametrize("name", ["q", "out"])
def test_vectors_of_the_kernel_for_hopper_are_aligned(name: str) -> None:
    """It copies queries, and stores results, 16 bytes at a time."""
    kernel, case = ops.kernels.sparse_attn_prefill_sm90, AttentionCase(((37, 1),), 8, 512, 128)
    args = case.args(DEVICE)
    args["out"] = kernel.outputs(**args)
    shape = args[name].shape
    args[name] = args[name].new_zeros(args[name].numel() + 1)[1:].view(shape)
    with pytest.raises(ValueError, match=f"{name}: expected an address that is a multiple of 16"):
        kernel.launch(**args)


# Any shape

HEADS = (1, 8, 13, 16)
MODELS: list[dict[str, Any]] = [
    {"C": 128, "rows": 16, "ratio": 4, "per_page": 8, "heads": HEADS},
    {"C": 128, "rows": 20, "ratio": 1, "per_page": 4, "heads": HEADS},
    {"C": 128, "rows": 16, "ratio": 16, "per_page": 2, "is_rotated": False, "heads": HEADS},
]
if DEVICE == "cuda":  # the sizes of the kernel for Hopper
    MODELS += [
        {"C": 512, "rows": 128, "ratio": 2, "per_page": 64, "heads": (64, 70, 128)},
        {"C": 512, "rows": 100, "ratio": 1, "per_page": 6, "heads": (64, 33)},
    ]


@pytest.mark.parametrize("shard", range(FUZZ_SHARDS))
def test_any_shape(shard: int) -> None:
    """DSV4_FUZZ_EXAMPLES shapes in all, shared by tests that may run side by side."""

    @seed(shard)
    @settings(
        max_examples=1 + -(-FUZZ_EXAMPLES // FUZZ_SHARDS),  # the first is the simplest in all
        deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        name=st.sampled_from(OPS), model=st.sampled_from(MODELS), head=st.integers(0, 3),
        topk=st.sampled_from((None, 1, 7, 24)), padding=st.integers(0, 1),
        requests=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 2)), max_size=ROWS),
        data_seed=st.integers(0, 99),
    )  # fmt: skip
    def check(
        name: str, model: dict[str, Any], head: int, topk: int | None, padding: int,
        requests: list[tuple[int, int]], data_seed: int,
    ) -> None:  # fmt: skip
        H = model["heads"][head % len(model["heads"])]
        sizes = {k: v for k, v in model.items() if k != "heads"}
        case = AttentionCase(requests, H, topk=topk, padding=padding, seed=data_seed, **sizes)
        assert_right(name, case.args(DEVICE))

    check()


# The page of a step


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("T", [0, 1, 9])
def test_step_page_equals_the_oracle(T: int, dtype: torch.dtype) -> None:
    for C in (128, 192, 512):
        kv = (torch.randn(T, C) * 2.0 ** torch.randint(-12, 12, (T, 1))).to(dtype)
        got = ops.kv_step_pack(kv.to(DEVICE), 64)
        assert_bits_equal("page", got, oracle.kv_step_pack(kv, 64))


def test_step_page_is_what_attention_reads() -> None:
    kv = torch.randn(3, 128).to(BF16)
    args = AttentionCase(((0, 3),), rows=16).args(DEVICE)
    args["step"] = ops.kv_step_pack(kv.to(DEVICE), 64)
    args |= {"entries": torch.full((3, 1), -1, device=DEVICE)}
    assert_right("sparse_attn_prefill", args)
    assert_bits_equal("page", args["step"].cpu(), kv_page_pack(kv))
    assert kv_page_unpack(args["step"].cpu(), 3, 128).isfinite().all()


# Every op: nothing to do, the registered op, a bad argument


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str) -> None:
    assert run(name, AttentionCase((), topk=4).args(DEVICE)).shape == (0, 16, 128)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("topk", [None, 8])
def test_op_contract(name: str, topk: int | None) -> None:
    args = AttentionCase(((20, 1),), topk=topk, is_rotated=topk is not None).args(DEVICE)
    torch.library.opcheck(getattr(ops, name).op, (), args)


def test_step_pack_op_contract() -> None:
    torch.library.opcheck(ops.kv_step_pack.op, (torch.randn(2, 128, device=DEVICE), 64))


def launch(name: str, args: dict[str, Any]) -> None:
    out = torch.empty(1, 16, 128, dtype=BF16, device=DEVICE)
    getattr(ops.kernels, name).launch(**args, out=(out,) * 3 if "decode" in name else out)


BAD = {
    "q": lambda x: x.float(),
    "step": lambda x: x[:-1],
    "window": lambda x: x[:, :-8].contiguous(),
    "pages": lambda x: x[:, 8:].contiguous(),
    "page_table": lambda x: x.long(),
    "entries": lambda x: x.float(),
    "sink": lambda x: x[1:],
    "sin": lambda x: None,
    "cos": lambda x: x[:, 1:].contiguous(),
    "scale": lambda x: 0.0,
    "rows": lambda x: 0,
    "rope_dim": lambda x: 32,
    "ratio": lambda x: -1,
    "entries_per_page": lambda x: 3.5,
}


@pytest.mark.parametrize("argument", BAD)
@pytest.mark.parametrize("name", OPS)
def test_a_bad_argument_is_named(name: str, argument: str) -> None:
    args = AttentionCase(((20, 1),), topk=8).args(DEVICE)
    args[argument] = BAD[argument](args[argument])
    with pytest.raises(ValueError, match=argument) as error:
        launch(name, args)
    assert "expected" in str(error.value)
    assert "got" in str(error.value)


@pytest.mark.parametrize("name", OPS)
def test_an_odd_address_is_refused(name: str) -> None:
    args = AttentionCase(((20, 1),), topk=8).args(DEVICE)
    moved = torch.empty(args["pages"].numel() + 8, dtype=torch.uint8, device=DEVICE)[8:]
    args["pages"] = moved.view(args["pages"].shape)
    with pytest.raises(ValueError, match="pages: expected an address"):
        run(name, args)
