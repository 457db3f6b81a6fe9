"""mHC kernels against dsv4.reference.mhc in FP64, and against themselves token by token."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.core.errors import KernelUnavailable
from dsv4.kernels import mhc as kernels
from dsv4.kernels.common import cuda
from dsv4.ops import mhc as ops
from dsv4.reference import mhc as oracle
from dsv4.reference.quant import fp8_act_quantize
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.mhc import OPS, hard_mixes, maps_case, mhc_case, wide_case
from dsv4.testing.numeric import assert_as_exact_as, assert_bits_equal

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

BF16, FP32 = torch.bfloat16, torch.float32
WITH_MAPS = ("mhc_post_pre", "mhc_pre_norm")
NAMES = {
    "mhc_post_pre": ("streams", "y", "post", "comb", "value", "scale"),
    "mhc_pre_norm": ("y", "post", "comb", "value", "scale"),
    "mhc_post": ("streams",),
    "hc_head_norm": ("y",),
}
# Whole and partial blocks of tokens and of columns; 128 and 256 are the tiny and the nano width.
# Some tokens each, so that the oracle's own error is that of many numbers.
SHAPES = [(24, 256), (17, 128), (19, 200)]
if DEVICE == "cuda":  # Flash, Pro, and what the wider kernels do not take
    SHAPES += [(16, 4096), (100, 4096), (37, 7168), (21, 1024), (33, 4224)]


def named(op: str, results: Any) -> dict[str, Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return dict(zip(NAMES[op], results, strict=True))


def run(op: str, args: dict[str, Any]) -> dict[str, Tensor]:
    return named(op, getattr(ops, op)(**args))


def on(device: str, args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def token(args: dict[str, Any], *rows: int) -> dict[str, Any]:
    """The arguments of some tokens alone."""
    per_token = ("o", "x", "post", "comb")
    return {k: v[list(rows)].contiguous() if k in per_token else v for k, v in args.items()}


def assert_as_exact(op: str, got: dict[str, Tensor], args: dict[str, Any]) -> None:
    """Floats against the oracle in FP64; the FP8 copy against the cast of the y that was given."""
    if op == "mhc_post_pre":  # what follows is measured on the streams that were written
        same = {"streams": oracle.mhc_post(**{k: args[k] for k in ("o", "x", "post", "comb")})}
        wide = wide_case({k: args[k] for k in ("o", "x", "post", "comb")})
        assert_as_exact_as("streams", got["streams"], same["streams"], oracle.mhc_post(**wide))
        rest = {k: v for k, v in args.items() if k not in ("o", "post", "comb")}
        op, args = "mhc_pre_norm", rest | {"x": got["streams"]}
    same = named(op, getattr(oracle, op)(**args))
    exact = named(op, getattr(oracle, op)(**wide_case(args)))
    for name in set(NAMES[op]) - {"value", "scale"}:
        assert got[name].dtype == same[name].dtype
        assert_as_exact_as(name, got[name], same[name], exact[name])
    if "value" in NAMES[op]:
        value, scale = fp8_act_quantize(got["y"]) if args["quantise"] else (same["value"],) * 2
        assert_bits_equal("value", got["value"], value)
        assert_bits_equal("scale", got["scale"].view(torch.uint8), scale.view(torch.uint8))


@pytest.mark.parametrize(("T", "D"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("op", OPS)
def test_as_exact_as_the_oracle(op: str, dtype: torch.dtype, T: int, D: int) -> None:
    quantise = D % 128 == 0
    args = mhc_case(op, T, D, dtype=dtype, quantise=quantise, device=DEVICE, seed=T)
    assert_as_exact(op, run(op, args), args)


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_every_number_of_rounds(iters: int) -> None:
    args = mhc_case(
        "mhc_pre_norm", 3, 1024 if DEVICE == "cuda" else 128, iters=iters, device=DEVICE
    )
    assert_as_exact("mhc_pre_norm", run("mhc_pre_norm", args), args)


def test_maps_of_extreme_mixes() -> None:
    """Gains that make the softmax one-hot and the sigmoids zero or one."""
    args = mhc_case("mhc_pre_norm", 6, 1024 if DEVICE == "cuda" else 128, device=DEVICE)
    args["scale"] = torch.tensor([50.0, 80.0, 60.0], device=DEVICE)
    got = run("mhc_pre_norm", args)
    exact = named("mhc_pre_norm", oracle.mhc_pre_norm(**wide_case(args)))
    same = named("mhc_pre_norm", oracle.mhc_pre_norm(**args))
    for name in ("post", "comb"):
        assert_as_exact_as(name, got[name], same[name], exact[name])
    assert bool((got["comb"].sum(dim=1) - 1).abs().max() < 1e-4)


@pytest.mark.parametrize(("iters", "eps"), [(1, 1e-6), (2, 1e-2), (20, 1e-6), (20, 0.0)])
@pytest.mark.parametrize("op", WITH_MAPS)
def test_maps_of_given_mixes(op: str, iters: int, eps: float) -> None:
    """Mixes without an error of their own: what is left is Sinkhorn's."""
    mixes = hard_mixes(7)
    if eps == 0:  # of columns without weight the oracle makes NaN
        mixes = mixes[mixes.abs().amax(1) <= 21]
    args = maps_case(op, mixes, 256, iters=iters, eps=eps, device=DEVICE)
    exact, same = (named(op, getattr(oracle, op)(**a)) for a in (wide_case(args), args))
    assert_as_exact_as("comb", run(op, args)["comb"], same["comb"], exact["comb"])


@pytest.mark.parametrize("D", [256, 4096, 7168] if DEVICE == "cuda" else [128])
@pytest.mark.parametrize("op", OPS)
def test_a_token_has_the_same_bits_alone_and_among_others(op: str, D: int) -> None:
    T = 50 if DEVICE == "cuda" else 18  # more than one block of tokens
    args = mhc_case(op, T, D, quantise=True, device=DEVICE)
    many = run(op, args)
    for rows in ([0], [16], [T - 1, 3, 17]):
        few = run(op, token(args, *rows))
        for name, x in few.items():
            assert_bits_equal(name, x.view(torch.uint8), many[name][rows].view(torch.uint8))


@pytest.mark.parametrize("D", [200, 4096, 7168] if DEVICE == "cuda" else [200])
@pytest.mark.parametrize("op", OPS)
def test_everything_is_written_and_nothing_else_is_read(op: str, D: int) -> None:
    """Results and working memory start as NaN, and every input lies between NaNs."""
    args = mhc_case(op, 18, D, quantise=D % 128 == 0, device=DEVICE)
    clean = run(op, args)

    def between_nans(x: Tensor) -> Tensor:
        pad = 8192
        memory = torch.full((x.numel() + 2 * pad,), float("nan"), dtype=x.dtype, device=x.device)
        memory[pad : pad + x.numel()] = x.flatten()
        return memory[pad : pad + x.numel()].view(x.shape)

    args = {k: between_nans(v) if isinstance(v, Tensor) else v for k, v in args.items()}
    for kernel in (k for k in vars(kernels).values() if getattr(k, "REFERENCE", "").endswith(op)):
        if not takes(kernel, args):
            continue
        out = kernel.outputs(**args)
        for x in out if isinstance(out, tuple) else (out,):
            x.view(torch.uint8).fill_(0xFF)
        kernel.launch(**args, out=out)
        first = out[: len(NAMES[op])] if isinstance(out, tuple) else out
        for name, x in named(op, first[0] if op == "hc_head_norm" else first).items():
            want = clean[name]
            if "triton" in kernel.SPEC.name and DEVICE == "cuda":
                assert bool(x.float().isfinite().all()), name
            else:
                assert_bits_equal(name, x.view(torch.uint8), want.view(torch.uint8))


def takes(kernel: Any, args: dict[str, Any]) -> bool:
    if kernel.SPEC.why_not(args["x"].device):
        return False
    return not hasattr(kernel, "why_not") or kernel.why_not(args["x"]) is None


@pytest.mark.parametrize("op", OPS)
def test_a_poisoned_token_spoils_itself_alone(op: str) -> None:
    D = 4096 if DEVICE == "cuda" else 128
    args = mhc_case(op, 19, D, quantise=True, device=DEVICE)
    clean = run(op, args)
    for row, value in ((2, float("nan")), (17, float("inf"))):
        args["x"] = args["x"].clone()
        args["x"][row, 1, 5] = value
    got = run(op, args)
    others = [t for t in range(19) if t not in (2, 17)]
    for name, x in got.items():
        same = clean[name][others].view(torch.uint8)
        assert_bits_equal(name, x[others].view(torch.uint8), same)


@pytest.mark.parametrize("op", OPS)
def test_no_tokens(op: str) -> None:
    args = mhc_case(op, 0, 256, quantise=True, device=DEVICE)
    got, want = run(op, args), named(op, getattr(oracle, op)(**args))
    for name, x in got.items():
        assert x.shape == want[name].shape
        assert x.dtype == want[name].dtype


@pytest.mark.parametrize("op", OPS)
def test_op_contract(op: str) -> None:
    args = mhc_case(op, 2, 1024 if DEVICE == "cuda" else 128, quantise=True, device=DEVICE)
    torch.library.opcheck(getattr(ops, op).op, tuple(args.values()))


BAD = [
    ("mhc_post_pre", "o", lambda o: o[:, :-1], "o: expected shape"),
    ("mhc_post_pre", "o", lambda o: o.float(), "o: expected torch.bfloat16"),
    ("mhc_post_pre", "x", lambda x: x.half(), "x: expected torch.float32 or torch.bfloat16"),
    ("mhc_post_pre", "x", lambda x: x[:, :3], "x: expected shape"),
    ("mhc_post_pre", "post", lambda p: p.to(BF16), "post: expected torch.float32"),
    ("mhc_post_pre", "comb", lambda c: c[:1], "comb: expected shape"),
    ("mhc_post_pre", "fn", lambda f: f[:-1], "fn: expected shape"),
    ("mhc_post_pre", "scale", lambda s: s[:2], "scale: expected shape"),
    ("mhc_post_pre", "base", lambda b: b[:-1], "base: expected shape"),
    ("mhc_post_pre", "norm", lambda n: n[1:], "norm: expected shape"),
    ("mhc_post_pre", "iters", lambda i: 0, "iters: expected an integer >= 1"),
    ("mhc_pre_norm", "fn", lambda f: f[:, 1:].contiguous(), "fn: expected shape"),
    ("mhc_pre_norm", "x", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "contiguous"),
    ("mhc_post", "comb", lambda c: c.transpose(1, 2), "comb: expected a contiguous tensor"),
    ("mhc_post", "o", lambda o: o[1:], "o: expected shape"),
    ("hc_head_norm", "scale", lambda s: s.double(), "scale: expected torch.float32"),
    ("hc_head_norm", "fn", lambda f: f[:3], "fn: expected shape"),
]


@pytest.mark.parametrize(("op", "name", "spoil", "message"), BAD)
@pytest.mark.parametrize("D", [128, 4096])
def test_names_the_bad_argument(op: str, name: str, spoil: Any, message: str, D: int) -> None:
    args = mhc_case(op, 2, D, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        run(op, args | {name: spoil(args[name])})


def test_the_fp8_copy_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="x: expected a last dim divisible by 128, got 200"):
        run("mhc_pre_norm", mhc_case("mhc_pre_norm", 2, 200, quantise=True, device=DEVICE))


def test_which_kernels_take_few_tokens() -> None:
    x, few = torch.zeros(8, 4, 4096, dtype=BF16), kernels.mhc_post_pre_few_sm90
    assert few.why_not(x) is None
    assert few.why_not(x[:0]) is None
    for other, reason in (
        (torch.zeros(9, 4, 4096, dtype=BF16), "at most 8 tokens, got 9"),
        (torch.zeros(5, 4, 7168, dtype=BF16), "at most 4 tokens, got 5"),
        (x.float(), "expected torch.bfloat16"),
        (torch.zeros(1, 4, 4224, dtype=BF16), "a multiple of 1024"),
    ):
        assert reason in (few.why_not(other) or "")
    assert "FP8" in (few.why_not(x, quantise=True) or "")
    assert few.EXCHANGE_INTS * 4 == 8 * 5 * 224 * 2 * 16 + 8 * 224 * 8 + 12 * 4


def test_which_kernel_takes_how_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks: not for a copy in FP8, other widths, or many tokens of a large one."""
    used: list[str] = []
    variants = "_few_sm90", "_many_sm90", "_sm90", ""
    for name in (f"mhc_post_pre{variant}" for variant in variants):
        monkeypatch.setattr(
            getattr(kernels, name), "launch", lambda *args, name=name, **kwargs: used.append(name)
        )
    monkeypatch.setattr(ops, "select", lambda specs, device: specs[0])
    few, many, wide, portable = (f"mhc_post_pre{variant}" for variant in variants)
    least = kernels.mhc_post_pre_many_sm90.CONFIG["MIN_TOKENS"]
    for T, D, quantise, want in (
        (1, 1024, False, few), (8, 4096, False, few), (9, 1024, False, wide),
        (4, 7168, False, few), (5, 7168, False, wide), (1, 1024, True, wide),
        (1, 256, False, portable), (least - 1, 1024, False, wide), (least, 1024, False, many),
        (least, 1024, True, many), (least, 7168, False, many), (least, 256, False, portable),
    ):  # fmt: skip
        ops.mhc_post_pre(**mhc_case("mhc_post_pre", T, D, quantise=quantise))
        assert used.pop() == want, (T, D, quantise)
    for T, eps, want in (
        (1, 1e-7, few),
        (1, 9e-8, portable),
        (least, 0.0, portable),
        (9, 2.0, portable),
    ):
        ops.mhc_post_pre(**mhc_case("mhc_post_pre", T, 1024) | {"eps": eps})
        assert used.pop() == want, (T, eps)


@pytest.mark.parametrize("name", ["mhc_post_pre_few_sm90", "mhc_post_pre_sm90"])
@pytest.mark.parametrize("at", [0, 1])
def test_results_of_the_kernels_for_hopper_are_aligned(name: str, at: int) -> None:
    """Streams and y leave 16 bytes at a time."""
    kernel, args = getattr(kernels, name), mhc_case("mhc_post_pre", 2, 1024)
    out = list(kernel.outputs(**args))
    out[at] = out[at].new_empty(out[at].numel() + 1)[1:].view(out[at].shape)
    which = ("streams", "y")[at]
    with pytest.raises(ValueError, match=f"{which}: expected an address that is a multiple of 16"):
        kernel.launch(**args, out=tuple(out))


@pytest.mark.parametrize("name", ["post", "comb", "norm", "fn", "streams", "y", "new_comb"])
def test_many_tokens_want_aligned_tensors(name: str) -> None:
    kernel, args = kernels.mhc_post_pre_many_sm90, mhc_case("mhc_post_pre", 256, 1024)
    out = list(kernel.outputs(**args))
    results = {"streams": 0, "y": 1, "new_comb": 3}
    x = out[results[name]] if name in results else args[name]
    x = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    if name in results:
        out[results[name]] = x
    else:
        args[name] = x
    with pytest.raises(ValueError, match=f"{name}: expected an address that is a multiple of 16"):
        kernel.launch(**args, out=tuple(out))


def test_many_tokens_refuse_few_by_name() -> None:
    kernel, args = kernels.mhc_post_pre_many_sm90, mhc_case("mhc_post_pre", 9, 1024)
    least = kernel.CONFIG["MIN_TOKENS"]
    with pytest.raises(KernelUnavailable, match=f"at least {least} tokens, got 9: call torch.ops"):
        kernel.launch(**args, out=kernel.outputs(**args))
    for other, reason in (
        (torch.zeros(least, 4, 1024), "expected torch.bfloat16"),
        (torch.zeros(least, 4, 1280, dtype=BF16), "a multiple of 1024"),
    ):
        assert reason in (kernel.why_not(other) or "")


@pytest.mark.parametrize("eps", [0.0, 9e-8, 1.1, float("nan")])
def test_kernels_for_hopper_refuse_an_eps_by_name(eps: float) -> None:
    """Beyond these, what their Sinkhorn multiplies may leave FP32."""
    for name, T in (
        ("mhc_post_pre_few_sm90", 1), ("mhc_post_pre_sm90", 1), ("mhc_post_pre_many_sm90", 256),
        ("mhc_pre_norm_sm90", 1),
    ):  # fmt: skip
        kernel = getattr(kernels, name)
        op = "mhc_pre_norm" if kernel is kernels.mhc_pre_norm_sm90 else "mhc_post_pre"
        args = mhc_case(op, T, 1024) | {"eps": eps}
        why = f"eps: expected a number from 1e-07 to 1, got {eps}: call torch.ops.dsv4.{op}"
        with pytest.raises(KernelUnavailable, match=f"{op}/sm90.*: {why}"):
            kernel.launch(**args, out=kernel.outputs(**args))


@pytest.mark.parametrize("D", range(1024, 7169, 1024))
def test_memory_of_a_block_for_many_tokens(D: int) -> None:
    """What an SM has: 227 KB for a block; 16 warps of 128 registers, four on each of its parts."""
    teams, threads, num_bytes = kernels.mhc_post_pre_many_sm90.plan(D)
    assert num_bytes <= 227 * 1024
    assert threads == teams * D // 16
    assert threads <= 512
    assert num_bytes % 16 == 0


def test_few_tokens_refuse_many_by_name() -> None:
    kernel, args = kernels.mhc_post_pre_few_sm90, mhc_case("mhc_post_pre", 9, 1024)
    with pytest.raises(KernelUnavailable, match="at most 8 tokens, got 9: call torch.ops.dsv4"):
        kernel.launch(**args, out=kernel.outputs(**args))


def test_memory_of_a_capture_and_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stream has its own, each capture others for as long as it lasts."""
    at = SimpleNamespace(cuda_stream=7)
    capture = [0]
    result = SimpleNamespace(CUDA_SUCCESS=0)
    driver = SimpleNamespace(
        CUresult=result, cuStreamGetCaptureInfo=lambda stream: (0, None, capture[0], None, [], 0)
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: at)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture[0] > 0)
    monkeypatch.setattr(cuda, "driver", driver)
    monkeypatch.setattr(cuda, "_kept", {})
    device = torch.device("cpu")

    def memory(stream: int, of: int) -> Tensor:
        at.cuda_stream, capture[0] = stream, of
        return cuda.kept_memory(device, 9)

    seven = memory(7, 0)
    assert seven.tolist() == [0] * 9
    assert memory(7, 0) is seven
    first = [memory(7, 0), memory(8, 0), memory(7, 1), memory(8, 1)]
    assert len({id(x) for x in first}) == 4
    assert memory(8, 1) is first[3]
    again = memory(7, 2)
    assert all(again is not x for x in first)
    assert [key[1] for key in cuda._kept] == [0, 0, 2]
    assert memory(7, 0) is seven


def test_a_source_holds_what_stands_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a change of that makes another cubin."""
    texts: list[bytes] = []
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cuda, "_cache_folder", lambda: tmp_path / "cubin")
    monkeypatch.setattr(cuda, "_compile", lambda text, *args: texts.append(text) or text)
    shared, own = tmp_path / "shared.cu", tmp_path / "own.cu"
    shared.write_text("int a;\n")
    own.write_text("int b;\n")
    source = cuda.Source.of(own, "own", {}, (shared,))
    assert source.compile("sm_90a") == source.compile("sm_90a")
    assert texts == [b'#line 1 "shared.cu"\nint a;\n#line 1 "own.cu"\nint b;\n']
    shared.write_text("int c;\n")
    assert b"int c" in source.compile("sm_90a")


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings are there without the library: they look for it at the first call."""

    def absent() -> tuple[int, int]:
        raise RuntimeError("libnvrtc is not there")

    assert cuda.why_not.__wrapped__() is None
    monkeypatch.setattr(cuda, "nvrtc_version", absent)
    assert "NVRTC (RuntimeError)" in (cuda.why_not.__wrapped__() or "")
    monkeypatch.setattr(cuda, "nvrtc", None)
    reason = cuda.why_not.__wrapped__()
    assert reason is not None
    assert reason.startswith("needs cuda-bindings: ")
    assert "[cuda]" in reason
