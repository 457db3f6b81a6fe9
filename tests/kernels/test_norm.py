"""dsv4.kernels.norm against the oracles: bit for bit where FP32 sums are exact, FP64 elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.kernels import norm as kernels
from dsv4.ops import cache as cache_ops
from dsv4.ops import norm as ops
from dsv4.reference import fused
from dsv4.reference.norm import rms_norm, rms_norm_unweighted
from dsv4.reference.quant import fp8_act_dequantize
from dsv4.reference.rope import apply_rope
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.cache import EPS, Span
from dsv4.testing.cases.norm import (
    FORMS,
    angles,
    head_args,
    kv_args,
    norm_calls,
    norm_weight,
    vectors,
)
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP32 = torch.bfloat16, torch.float32
FLOATS = [BF16, FP32]
MIXED: list[Span] = [(0, 0, 13), (2, 3, 1), (3, 21, 7)]
SHARE = 0.02


def on_device(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone().to(DEVICE) if isinstance(v, Tensor) else v for k, v in args.items()}


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return () if x is None else x if isinstance(x, tuple) else (x,)


def assert_same(name: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    """Run op and oracle; what they return and what they change must agree in every bit."""
    own, theirs = on_device(args), {k: v.clone() if isinstance(v, Tensor) else v
                                    for k, v in args.items()}  # fmt: skip
    oracle = rms_norm if name == "rms_norm" else getattr(fused, name)
    got, want = as_tuple(getattr(ops, name)(**own)), as_tuple(oracle(**theirs))
    assert len(got) == len(want)
    for i, pair in enumerate(zip(got, want, strict=True)):
        assert_bits_equal(f"{name} result {i}", *pair)
    for k, v in theirs.items():
        if isinstance(v, Tensor):
            assert_bits_equal(f"{name} argument {k}", own[k], v)
    return got


# RMSNorm and its cast


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "weight_dtype"),
    [((5, 4096), BF16), ((2, 7168), BF16), ((9, 1024), FP32), ((3, 1536), BF16), ((7, 128), BF16),
     ((5, 200), BF16), ((3, 1), FP32), ((2, 3, 64), BF16), ((96,), BF16)],
)  # fmt: skip
def test_rms_norm_equals_the_oracle(
    shape: tuple[int, ...], weight_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x = vectors(*shape, dtype=dtype, is_exact=True)
    assert_same("rms_norm", {"x": x, "weight": norm_weight(shape[-1]).to(weight_dtype), "eps": EPS})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dims", [4096, 7168, 200])
def test_rms_norm_is_as_exact_as_the_oracle(dims: int, dtype: torch.dtype) -> None:
    x, weight = vectors(6, dims, dtype=dtype), norm_weight(dims)
    got = ops.rms_norm(x.to(DEVICE), weight.to(DEVICE), EPS).cpu()
    same, exact = rms_norm(x, weight, EPS), rms_norm(x.double(), weight.double(), EPS)
    for row in range(len(x)):  # rows differ in magnitude, and each has to be exact
        assert_as_exact_as("row", got[row], same[row], exact[row])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 4096), (2, 7168), (3, 1536), (5, 128), (2, 3, 384)])
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm_quant_equals_the_oracle(
    form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight = vectors(*shape, dtype=dtype, is_exact=True), norm_weight(shape[-1])
    share = torch.tensor(SHARE) if form == "nvfp4" else None
    args = {"x": x, "weight": weight, "eps": EPS, "form": form, "global_scale": share}
    assert_same("rms_norm_quant", args)


def test_rms_norm_quant_of_random_rows_rarely_differs_from_the_oracle() -> None:
    x, weight = vectors(8, 4096), norm_weight(4096)
    args = on_device({"x": x, "weight": weight, "eps": EPS, "form": "fp8"})
    got, want = ops.rms_norm_quant(**args), fused.rms_norm_quant(x, weight, EPS, "fp8")
    assert_bits_equal("scale", got[1], want[1])
    codes = [data.cpu().view(torch.uint8).to(torch.int32) for data in (got[0], want[0])]
    apart = (codes[0] - codes[1]).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.001
    values = (fp8_act_dequantize(x.cpu(), s.cpu()) for x, s in (got, want))
    assert_as_exact_as("rows", *values, rms_norm(x.double(), weight.double(), EPS))


# Queries and the attention output


HEADS = [(3, 64, 512, 64), (2, 128, 512, 64), (5, 8, 512, 64), (2, 3, 192, 64), (2, 5, 70, 6),
         (1, 9, 64, 64)]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", HEADS)
def test_q_norm_rope_equals_the_oracle(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same("q_norm_rope", head_args(*sizes, dtype=dtype, is_exact=True) | {"eps": EPS})


@pytest.mark.parametrize("dtype", FLOATS)
def test_q_norm_rope_is_as_exact_as_the_oracle(dtype: torch.dtype) -> None:
    args = head_args(3, 8, dtype=dtype) | {"eps": EPS}
    got = ops.q_norm_rope(**on_device(args)).cpu()
    wide = {k: v.double() if k != "position" and isinstance(v, Tensor) else v
            for k, v in args.items()}  # fmt: skip
    assert_as_exact_as("q", got, fused.q_norm_rope(**args), fused.q_norm_rope(**wide))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sizes", HEADS)
def test_inverse_rope_equals_the_oracle(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same("inverse_rope", head_args(*sizes, dtype=dtype, name="o"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("sizes", "group"),
    [((3, 64, 512, 64), 128), ((2, 128, 512, 64), 128), ((5, 8, 512, 64), 64),
     ((2, 3, 192, 64), 64), ((2, 5, 72, 12), 8), ((1, 33, 64, 64), 32), ((2, 3, 256, 192), 128)],
)  # fmt: skip
def test_inverse_rope_quant_equals_the_oracle(
    sizes: tuple[int, ...], group: int, dtype: torch.dtype
) -> None:
    assert_same("inverse_rope_quant", head_args(*sizes, dtype=dtype, name="o") | {"group": group})


def test_the_inverse_rotation_undoes_the_rotation() -> None:
    args = on_device(head_args(4, 8, dtype=FP32))
    turn = {k: args[k] for k in ("cos", "sin", "position")}
    q = ops.q_norm_rope(args["q"], **turn, eps=EPS)
    ops.inverse_rope(q, **turn)
    want = rms_norm_unweighted(args["q"].double(), EPS)
    assert_as_exact_as("q", q, want.float(), want, factor=8)


# Window KV


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("head_dim", "rope_dim", "rows"),
    [(512, 64, 128), (512, 64, 7), (128, 64, 16), (192, 64, 5), (134, 6, 16), (704, 64, 3)],
)
def test_kv_equals_the_oracle(head_dim: int, rope_dim: int, rows: int, dtype: torch.dtype) -> None:
    sizes = {"head_dim": head_dim, "rope_dim": rope_dim, "rows": rows, "dtype": dtype}
    args = kv_args(MIXED, is_exact=True, **sizes)
    assert_same("kv_norm_rope_quant_insert", args)
    q = vectors(len(args["kv"]), 11, head_dim, dtype=dtype, is_exact=True)
    assert_same("q_kv_norm_rope_insert", {"q": q} | args)


def test_kv_of_random_rows_is_as_exact_as_the_oracle() -> None:
    args = kv_args([(0, 0, 40)], rows=64)
    got = ops.kv_norm_rope_quant_insert(**on_device(args)).cpu()
    same = fused.kv_norm_rope_quant_insert(**args | {"window": args["window"].clone()})
    wide = (args[k].double() for k in ("kv", "norm", "cos", "sin"))
    kv, norm, cos, sin = wide
    exact = apply_rope(rms_norm(kv, norm, EPS), cos, sin)
    assert_as_exact_as("rows", got, same, exact)
    assert (got != same).float().mean() < 0.001


def test_kv_row_is_what_the_window_reads() -> None:
    args = on_device(kv_args(MIXED, rows=32))
    got = ops.kv_norm_rope_quant_insert(**args)
    at = args["slot"], args["position"]
    read = cache_ops.gather_window(args["window"], *at, 32, 512, 64, BF16)
    assert_bits_equal("rows", got, read)


def test_kv_padding_and_other_slots_are_left_alone() -> None:
    args = on_device(kv_args(MIXED, padding=3))
    per_token = {k: v[:-3] for k, v in args.items() if k in PER_TOKEN}
    alone = args | per_token | {"window": args["window"].clone()}
    got = ops.kv_norm_rope_quant_insert(**args)
    assert got[-3:].isnan().all()
    assert got[:-3].isfinite().all()
    assert (args["window"][1] == 0xFF).all()
    ops.kv_norm_rope_quant_insert(**alone)
    assert_bits_equal("window", args["window"], alone["window"])
    used = 16 * KvRecord().nbytes  # 13 of 16 rows of slot 0, and no padding of its page
    assert (args["window"][0, used:] == 0xFF).all()
    assert (args["window"][0, 13 * 576 : 16 * 576] == 0xFF).all()


@pytest.mark.parametrize("is_reversed", [False, True])
def test_kv_of_a_chunk_longer_than_the_ring(is_reversed: bool) -> None:
    """Its last rows are written, in whatever order programs run."""
    args = kv_args([(1, 5, 37)], head_dim=128, is_exact=True)
    if is_reversed:
        per_row = ("kv", "slot", "position", "end_position")
        args |= {k: args[k].flip(0).contiguous() for k in per_row}
    assert_same("kv_norm_rope_quant_insert", args)


@pytest.mark.parametrize("name", ["kv_norm_rope_quant_insert", "q_kv_norm_rope_insert"])
def test_kv_of_rejected_drafts_is_not_written(name: str) -> None:
    """Rows from end_position on, also in a chunk longer than the ring and with none accepted."""
    spans: list[Span] = [(0, 3, 6), (1, 5, 37), (2, 0, 4), (3, 20, 2)]
    accepted = {0: 5, 1: 30, 2: 0}
    args = kv_args(spans, is_exact=True, accepted=accepted)
    q = {"q": vectors(len(args["kv"]), 3, 512, is_exact=True)} if name.startswith("q_") else {}
    *_, got = assert_same(name, q | args)
    assert got.isfinite().all()  # a draft's row is attended to, written or not
    window = args["window"].clone().to(DEVICE)
    ops.kv_norm_rope_quant_insert(**on_device(args) | {"window": window})
    written = (window[:, : 16 * 576].unflatten(1, (16, 576)) != 0xFF).any(dim=2).cpu()
    for slot, first, end in ((0, 3, 5), (1, 14, 30), (2, 0, 0), (3, 20, 22)):
        want = {p % 16 for p in range(first, end)}
        assert set(written[slot].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("size", [1, 3, 8])
def test_kv_does_not_depend_on_chunking(size: int) -> None:
    whole = on_device(kv_args([(0, 0, 20)], head_dim=128))
    rows = ops.kv_norm_rope_quant_insert(**whole)
    window = torch.full_like(whole["window"], 0xFF)
    for start in range(0, 20, size):
        n = min(size, 20 - start)
        at = slice(start, start + n)
        step = {k: whole[k][at] for k in ("kv", "slot", "position")}
        end = torch.full((n,), start + n, device=DEVICE)
        part = whole | step | {"end_position": end, "window": window}
        assert_bits_equal("rows", ops.kv_norm_rope_quant_insert(**part), rows[at])
    assert_bits_equal("window", window, whole["window"])


def test_one_launch_equals_two() -> None:
    args = kv_args(MIXED, padding=2)
    q = vectors(len(args["kv"]), 11, 512, seed=3)
    both, apart = on_device({"q": q} | args), on_device(args)
    got_q, got_kv = ops.q_kv_norm_rope_insert(**both)
    turn = {k: apart[k] for k in ("cos", "sin", "position")}
    assert_bits_equal("q", got_q, ops.q_norm_rope(q.to(DEVICE), **turn, eps=EPS))
    kv = ops.kv_norm_rope_quant_insert(**apart)
    assert_bits_equal("kv", got_kv[:-2], kv[:-2])
    assert_bits_equal("window", both["window"], apart["window"])


# Every op: alone and in a batch, poison, nothing to do, the registered op, a bad argument

OPS = sorted(norm_calls(0))
PER_TOKEN = ("x", "q", "o", "kv", "position", "slot", "end_position")


def op_named(name: str) -> Any:
    return getattr(ops, name.partition("/")[0])


def results(name: str, args: dict[str, Any]) -> tuple[Tensor, ...]:
    out = as_tuple(op_named(name)(**args))
    return out or (args["o"],)


@pytest.mark.parametrize("name", OPS)
def test_a_token_does_not_depend_on_the_batch(name: str) -> None:
    args = norm_calls(9, dims=1024, device=DEVICE)[name]
    one = {k: v[6:7].clone() if k in PER_TOKEN else v for k, v in args.items()}
    windows = {k: args[k].clone() for k in args if k == "window"}
    many, alone = results(name, args), results(name, one | windows)
    for i, (m, o) in enumerate(zip(many, alone, strict=True)):
        assert_bits_equal(f"result {i}", m[6:7], o)


@pytest.mark.parametrize("name", OPS)
def test_a_bad_token_spoils_no_other(name: str) -> None:
    first = {"rms_norm": "x", "inverse_rope": "o"}.get(name, next(iter(norm_calls(1)[name])))
    clean, spoilt = (norm_calls(5, dims=384, device=DEVICE)[name] for _ in range(2))
    spoilt[first] = spoilt[first].clone()
    spoilt[first][2], keep = torch.nan, [0, 1, 3, 4]
    if "kv" in spoilt:
        spoilt["kv"][2] = torch.inf
    for got, want in zip(results(name, spoilt), results(name, clean), strict=True):
        assert_bits_equal("other tokens", got[keep], want[keep])
        bad = got[2].float() if got.is_floating_point() else None
        assert bad is None or bad.isnan().any()


@pytest.mark.parametrize("name", [n for n in OPS if n != "inverse_rope"])
def test_every_output_is_written(name: str) -> None:
    args = norm_calls(5, dims=384, heads=5, device=DEVICE)[name]
    kernel = getattr(kernels, name.partition("/")[0])
    want, out = as_tuple(op_named(name)(**args)), kernel.outputs(**args)
    for x in as_tuple(out):
        x.view(torch.uint8).fill_(0xFF)
    kernel.launch(**args, out=out)
    for got, expected in zip(as_tuple(out), want, strict=True):
        assert_bits_equal(name, got, expected)


@pytest.mark.parametrize("name", OPS)
def test_nothing_to_do_changes_nothing(name: str) -> None:
    args = norm_calls(0, device=DEVICE)[name]
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    out = as_tuple(op_named(name)(**args))
    assert all(x.shape[0] == 0 for x in out)
    for k, v in before.items():
        assert_bits_equal(k, args[k], v)


@pytest.mark.parametrize("name", OPS)
def test_op_contract(name: str) -> None:
    torch.library.opcheck(op_named(name).op, (), norm_calls(3, device=DEVICE)[name])


BAD = [
    ("rms_norm", "weight", lambda x: x[1:]),
    ("rms_norm", "x", lambda x: x.double()),
    ("rms_norm_quant/fp8", "x", lambda x: x[:, :100].contiguous()),
    ("rms_norm_quant/fp8", "form", lambda x: "int8"),
    ("rms_norm_quant/fp8", "global_scale", lambda x: torch.ones((), device=DEVICE)),
    ("rms_norm_quant/nvfp4", "global_scale", lambda x: None),
    ("q_norm_rope", "position", lambda x: x.int()),
    ("q_norm_rope", "cos", lambda x: x.double()),
    ("kv_norm_rope_quant_insert", "window", lambda x: x[:, 1:].contiguous()),
    ("kv_norm_rope_quant_insert", "rows", lambda x: 0),
    ("q_kv_norm_rope_insert", "q", lambda x: x[:2]),
    ("inverse_rope", "o", lambda x: x.transpose(0, 1)),
    ("inverse_rope_quant", "group", lambda x: 96),
    ("inverse_rope_quant", "sin", lambda x: x[:, 1:].contiguous()),
]


@pytest.mark.parametrize(("name", "argument", "spoil"), BAD)
def test_a_bad_argument_is_named(name: str, argument: str, spoil: Any) -> None:
    args = norm_calls(4, device=DEVICE)[name]
    args[argument] = spoil(args[argument])
    with pytest.raises(ValueError, match=argument) as error:
        op_named(name)(**args)
    assert "expected" in str(error.value)
    assert "got" in str(error.value)


def test_more_pairs_than_a_head_has_are_refused() -> None:
    args = norm_calls(4, device=DEVICE)["q_norm_rope"]
    with pytest.raises(ValueError, match="cos: expected 1 to 256 pairs, got 320"):
        ops.q_norm_rope(**args | {k: args[k].repeat(1, 10) for k in ("cos", "sin")})


def test_the_table_row_is_the_position() -> None:
    """Queries at positions p rotate as with the rows p of the tables, in any order."""
    table = angles(50, device=DEVICE)
    q = vectors(3, 2, 512, device=DEVICE)
    position = torch.tensor([49, 0, 7], device=DEVICE)
    got = ops.q_norm_rope(q, **table, position=position, eps=EPS)
    picked = {k: v[position].contiguous() for k, v in table.items()}
    want = ops.q_norm_rope(q, **picked, position=torch.arange(3, device=DEVICE), eps=EPS)
    assert_bits_equal("q", got, want)
