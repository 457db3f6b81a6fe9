"""Norm and quant kernels where the interpreter cannot look: conversion instructions, graphs,
large shapes, addresses beyond 2^31, torch.compile.
"""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.kernels.common import bits, rows
from dsv4.ops import norm as norm_ops
from dsv4.ops import quant as quant_ops
from dsv4.reference import fused, quant
from dsv4.reference.norm import rms_norm
from dsv4.testing.cases.cache import EPS
from dsv4.testing.cases.norm import FORMS, head_args, kv_args, norm_calls, norm_weight, vectors
from dsv4.testing.cases.quant import quant_calls
from dsv4.testing.numeric import assert_bits_equal

pytestmark = pytest.mark.gpu

BF16, FP32 = torch.bfloat16, torch.float32


def on_gpu(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone().cuda() if isinstance(v, Tensor) else v for k, v in args.items()}


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return () if x is None else x if isinstance(x, tuple) else (x,)


def op_named(name: str) -> Any:
    op = name.partition("/")[0]
    return getattr(norm_ops, op, None) or getattr(quant_ops, op)


@triton.jit
def casts_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Each cast by instruction and by integers, side by side: 6 rows of codes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, 0.0)
    byte = rows.e4m3_byte(x)
    tl.store(out_ptr + i, rows.to_bf16(x).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, i < n)
    tl.store(out_ptr + n + i, bits.bf16_bits(x) & 0xFFFF, i < n)
    tl.store(out_ptr + 2 * n + i, byte.to(tl.int32), i < n)
    tl.store(out_ptr + 3 * n + i, bits.e4m3_code(x), i < n)
    tl.store(out_ptr + 4 * n + i, rows.e4m3_float(byte).to(tl.int32, bitcast=True), i < n)
    tl.store(out_ptr + 5 * n + i, bits.e4m3_value(byte.to(tl.int32)).to(tl.int32, bitcast=True),
             i < n)  # fmt: skip


def test_conversion_instructions_give_the_bits_of_the_integer_rules() -> None:
    """Every BF16 pattern, 2^26 random FP32 patterns, every E4M3 code and midpoint."""
    every = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(FP32)
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (table[1:] + table[:-1]) / 2
    near = torch.cat([table, middle])
    sides = [torch.nextafter(near, torch.full_like(near, d)) for d in (-torch.inf, torch.inf)]
    near = torch.cat([near, *sides])
    wild = torch.randint(-(2**31), 2**31, (1 << 26,), device="cuda", dtype=torch.int64)
    x = torch.cat([every, near, -near]).cuda()
    x = torch.cat([x, wild.to(torch.int32).view(FP32)])
    out = torch.full((6, len(x)), -1, dtype=torch.int32, device="cuda")
    casts_kernel[(triton.cdiv(len(x), 1024),)](x, out, len(x), BLOCK=1024)
    nan = x.isnan()
    assert nan.sum() > 100
    assert torch.equal(out[0][~nan], out[1][~nan])
    assert (out[0][nan] & 0x7FFF == 0x7FFF).all()
    assert torch.equal(out[2], out[3])
    assert torch.equal(out[4][~nan], out[5][~nan])
    values = out[4:6].view(FP32)
    assert values[:, nan].isnan().all()
    want = quant.e4m3_round(x[~nan])
    assert torch.equal(out[2][~nan], want.view(torch.uint8).int())
    assert torch.equal(out[0][~nan], x[~nan].to(BF16).view(torch.int16).int() & 0xFFFF)


@pytest.mark.parametrize("dims", [4096, 7168, 1024, 1536])
def test_norms_of_a_long_prompt_equal_the_oracle(dims: int) -> None:
    x, weight = vectors(2050, dims, is_exact=True), norm_weight(dims)
    got = norm_ops.rms_norm(x.cuda(), weight.cuda(), EPS)
    assert_bits_equal("rows", got, rms_norm(x, weight, EPS))
    for form in FORMS:
        share = torch.tensor(0.02) if form == "nvfp4" else None
        args = {"x": x, "weight": weight, "eps": EPS, "form": form, "global_scale": share}
        want = fused.rms_norm_quant(**args)
        for pair in zip(norm_ops.rms_norm_quant(**on_gpu(args)), want, strict=True):
            assert_bits_equal(form, *pair)


@pytest.mark.parametrize("heads", [64, 128])
def test_heads_of_a_long_prompt_equal_the_oracle(heads: int) -> None:
    args = head_args(300, heads, is_exact=True) | {"eps": EPS}
    assert_bits_equal("q", norm_ops.q_norm_rope(**on_gpu(args)), fused.q_norm_rope(**args))
    args = head_args(300, heads, name="o")
    own, theirs = on_gpu(args), {k: v.clone() for k, v in args.items()}
    got, want = (f.inverse_rope_quant(**a) for f, a in ((norm_ops, own), (fused, theirs)))
    for pair in zip(got, want, strict=True):
        assert_bits_equal("quantised", *pair)
    norm_ops.inverse_rope(**own)
    fused.inverse_rope(**theirs)
    assert_bits_equal("o", own["o"], theirs["o"])


def test_kv_of_a_long_prompt_equals_the_oracle() -> None:
    spans = [(0, 0, 1500), (2, 0, 50), (3, 7, 129)]
    args = kv_args(spans, rows=128, is_exact=True)
    args["q"] = vectors(len(args["kv"]), 64, 512, is_exact=True)
    own, theirs = on_gpu(args), dict(args)
    got, want = (f.q_kv_norm_rope_insert(**a) for f, a in ((norm_ops, own), (fused, theirs)))
    for pair in zip(got, want, strict=True):
        assert_bits_equal("result", *pair)
    assert_bits_equal("window", own["window"], theirs["window"])


@pytest.mark.parametrize("op", ["fp8_act_quantize", "mxfp4_act_quantize", "nvfp4_act_quantize"])
def test_casts_of_a_long_prompt_equal_the_oracle(op: str) -> None:
    x = vectors(2050, 4096)
    oracle = fused if op.startswith("nvfp4") else quant
    got, want = getattr(quant_ops, op)(x.cuda()), getattr(oracle, op)(x)
    for pair in zip(got, want, strict=True):
        assert_bits_equal(op, *pair)
    back = op.replace("quantize", "dequantize")
    for dtype in (BF16, FP32):
        values = getattr(quant_ops, back)(*got, dtype)
        assert_bits_equal(back, values, getattr(oracle, back)(*want, dtype))


CALLS = {**norm_calls(2), **quant_calls(2)}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_graph_replays_with_what_its_tensors_hold(name: str) -> None:
    """Captured on one step, replayed on another: other values, other positions."""
    made = norm_calls if name in norm_calls(0) else quant_calls
    args = made(8, device="cuda")[name]
    new = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    for k in new.keys() & {"x", "w", "q", "o", "kv", "data", "packed", "position"}:
        new[k] = new[k].flip(0).contiguous()
    op_named(name)(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = as_tuple(op_named(name)(**args))
    for k, v in new.items():
        args[k].copy_(v)
    graph.replay()
    want = as_tuple(op_named(name)(**args | new))
    for got, expected in zip(out, want, strict=True):
        assert_bits_equal(name, got, expected)
    for k in new.keys() & {"window", "o"}:
        assert_bits_equal(k, args[k], new[k])


@pytest.mark.parametrize("name", sorted(CALLS))
def test_torch_compile_keeps_the_op(name: str) -> None:
    made = norm_calls if name in norm_calls(0) else quant_calls
    plain, compiled = (made(3, device="cuda")[name] for _ in range(2))
    want = as_tuple(op_named(name)(**plain))
    torch.compiler.reset()  # all names share the lambda's code, which may be compiled eight times
    step = torch.compile(lambda **kwargs: op_named(name)(**kwargs), fullgraph=True)
    for got, expected in zip(as_tuple(step(**compiled)), want, strict=True):
        assert_bits_equal(name, got, expected)
    for k in plain.keys() & {"window", "o"}:
        assert_bits_equal(k, compiled[k], plain[k])


def test_addresses_beyond_two_gigabytes() -> None:
    """The last rows of 2^31 elements and more equal the same rows alone."""
    T = 2**31 // 4096 + 9
    x = torch.zeros(T, 4096, dtype=BF16, device="cuda")
    x[-3:] = vectors(3, 4096).cuda()
    weight = norm_weight(4096, device="cuda")
    last = x[-3:].clone()
    assert_bits_equal(
        "norm", norm_ops.rms_norm(x, weight, EPS)[-3:], norm_ops.rms_norm(last, weight, EPS)
    )
    for op in (
        lambda y: norm_ops.rms_norm_quant(y, weight, EPS, "fp8"),
        quant_ops.fp8_act_quantize,
        quant_ops.mxfp4_act_quantize,
        lambda y: quant_ops.nvfp4_act_quantize(y, torch.tensor(0.1, device="cuda")),
    ):
        for many, alone in zip(op(x)[:2], op(last)[:2], strict=True):
            assert_bits_equal("cast", many[-3:], alone)
    assert_bits_equal(
        "global scale", quant_ops.nvfp4_act_quantize(x)[2], quant_ops.nvfp4_act_quantize(last)[2]
    )
    data, scale = quant_ops.fp8_block_quantize(x)
    edge = T // 128 * 128
    for many, alone in zip((data, scale), quant_ops.fp8_block_quantize(x[edge:]), strict=True):
        assert_bits_equal("block", many[-len(alone) :], alone)
    values = quant_ops.fp8_block_dequantize(data, scale, BF16)[-3:]
    assert_bits_equal("back", values, quant.dequantize(_block(data[edge:], scale[-1:]), BF16)[-3:])


def _block(data: Tensor, scale: Tensor) -> Any:
    return quant.BlockScaledTensor(quant.FP8_BLOCK128, data, scale)


def test_heads_beyond_two_gigabytes() -> None:
    T = 2**31 // (64 * 512) + 3
    q = torch.zeros(T, 64, 512, dtype=BF16, device="cuda")
    args = on_gpu(head_args(3, 64))
    q[-3:] = args["q"]
    position = torch.zeros(T, dtype=torch.int64, device="cuda")
    position[-3:] = args["position"]
    turn, many = {k: args[k] for k in ("cos", "sin")}, {"position": position}
    alone = {"position": args["position"]}
    got = norm_ops.q_norm_rope(q, **turn, **many, eps=EPS)[-3:]
    assert_bits_equal("q", got, norm_ops.q_norm_rope(args["q"], **turn, **alone, eps=EPS))
    got = norm_ops.inverse_rope_quant(q, **turn, **many)
    want = norm_ops.inverse_rope_quant(args["q"], **turn, **alone)
    for x, y in zip(got, want, strict=True):
        assert_bits_equal("quantised", x[-3:], y)
    norm_ops.inverse_rope(q, **turn, **many)
    norm_ops.inverse_rope(args["q"], **turn, **alone)
    assert_bits_equal("o", q[-3:], args["q"])


@pytest.mark.parametrize("name", sorted(CALLS))
def test_runs_repeat_bit_for_bit(name: str) -> None:
    made = norm_calls if name in norm_calls(0) else quant_calls
    runs = []
    for _ in range(3):
        args = made(700, 1024, device="cuda")[name]
        out = as_tuple(op_named(name)(**args))
        runs.append([*out, *(args[k] for k in ("window", "o") if k in args)])
    for again in runs[1:]:
        for got, want in zip(again, runs[0], strict=True):
            assert_bits_equal(name, got, want)
