"""Inputs of the mHC kernels."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Generator, Tensor

N, NORM_EPS, EPS, ITERS = 4, 1e-6, 1e-6, 20
OPS = ("mhc_post_pre", "mhc_pre_norm", "mhc_post", "hc_head_norm")


def mhc_case(
    op: str, T: int, D: int, *, dtype: torch.dtype = torch.bfloat16, quantise: bool = False,
    iters: int = ITERS, device: str = "cpu", seed: int = 0, weight_seed: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of an mHC op: streams of spread sizes, mixes of order one, doubly stochastic comb.

    The first tokens of a longer case of the same seed are those of a shorter one.
    """
    g, w = Generator().manual_seed(seed), Generator().manual_seed(weight_seed)
    tokens = [_token(D, g) for _ in range(T)]

    def part(i: int, *shape: int) -> Tensor:
        return torch.stack([t[i] for t in tokens]) if T else torch.empty(0, *shape)

    x, o = part(0, N, D).to(dtype), part(1, D).to(dtype)
    post, comb = part(2, N), part(3, N, N)
    weights = _weights(op, D, w)
    args: dict[str, Any] = {"x": x}
    if op in ("mhc_post", "mhc_post_pre"):
        args = {"o": o, "x": x, "post": post, "comb": comb}
    if op != "mhc_post":
        args |= weights
    if op in ("mhc_post_pre", "mhc_pre_norm"):
        args["iters"] = iters
    if op != "mhc_post":
        args |= {"norm_eps": NORM_EPS, "eps": EPS}
    if op in ("mhc_post_pre", "mhc_pre_norm"):
        args["quantise"] = quantise
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def maps_case(
    op: str, mixes: Tensor, D: int, *, iters: int = ITERS, eps: float = EPS, device: str = "cpu"
) -> dict[str, Any]:
    """Arguments whose maps come of exactly these mixes of comb [T, N N], in any precision.

    A token is one element that is 1, at a place of its own, which takes its mixes out of fn. Its
    RMS, without an eps, is a power of two: N D is one of four. The gates are 1/2.
    """
    T, root = len(mixes), isqrt(N * D)
    if root * root != N * D or root & (root - 1) or T > N * D:
        raise ValueError(f"D: expected N D to be a power of four and at least {T}, got {D}")
    place = torch.arange(T) * (N * D // max(T, 1))
    x, fn = torch.zeros(T, N * D, dtype=torch.bfloat16), torch.zeros(N * (N + 2), N * D)
    x[torch.arange(T), place] = 1
    fn[2 * N :, place] = (mixes.T / root).float()
    args: dict[str, Any] = {"x": x.view(T, N, D)}
    if op == "mhc_post_pre":  # new streams are the old ones
        post, comb = torch.zeros(T, N), torch.eye(N).expand(T, N, N).contiguous()
        args = {"o": x.view(T, N, D)[:, 0].contiguous(), **args, "post": post, "comb": comb}
    args |= {"fn": fn, "scale": torch.ones(3), "base": torch.zeros(N * (N + 2))}
    args |= {"norm": torch.ones(D), "iters": iters, "norm_eps": 0.0, "eps": eps, "quantise": False}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in args.items()}


def hard_mixes(each: int, seed: int = 0) -> Tensor:
    """Mixes [6 each, N N] from which Sinkhorn has a long way to go, or none."""
    g = Generator().manual_seed(seed)
    shape = each, N, N

    def some(*size: int) -> Tensor:
        return torch.rand(*size, generator=g)

    gain = torch.tensor([1.0, 3.0, 10.0, 60.0, 300.0, 1e4, 1e30])[torch.arange(each) % 7]
    normal = torch.randn(shape, generator=g) * gain[:, None, None]
    one_hot = torch.zeros(shape).scatter_(2, (some(each, N, 1) * N).long(), 1.0)
    column = torch.zeros(shape).index_fill_(2, torch.tensor(1), 1.0)
    steps = torch.ones(N, N).triu(-1).expand(shape)  # only a zero element would make it balanced
    levels = (some(*shape) * N).floor() * 7
    size = 50 * some(each, 1, 1)
    parts = normal, one_hot * 1e4, one_hot * size, column * size, steps * size, levels
    return torch.cat(parts).flatten(1)


def wide_case(args: dict[str, Any]) -> dict[str, Any]:
    """The same arguments in FP64."""
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()}


def aot_calls() -> dict[str, dict[str, Any]]:
    """Calls at the width of V4-Flash, and of the fused op in its other forms and at V4-Pro's."""
    calls = {f"{op}/flash": mhc_case(op, 8, 4096) for op in OPS}
    calls["mhc_post_pre/flash-fp8"] = mhc_case("mhc_post_pre", 8, 4096, quantise=True)
    calls["mhc_post_pre/flash-fp32"] = mhc_case("mhc_post_pre", 8, 4096, dtype=torch.float32)
    calls["mhc_post_pre/pro"] = mhc_case("mhc_post_pre", 8, 7168)
    return calls


def _token(D: int, g: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = torch.exp2(torch.randint(-3, 4, (N, 1), generator=g).float())
    x = torch.randn(N, D, generator=g) * size
    o = torch.randn(D, generator=g)
    post = 2 * torch.rand(N, generator=g)
    comb = torch.rand(N, N, generator=g) + 0.01
    for _ in range(20):
        comb = comb / comb.sum(dim=1, keepdim=True)
        comb = comb / comb.sum(dim=0, keepdim=True)
    return x, o, post, comb


def _weights(op: str, D: int, g: Generator) -> dict[str, Tensor]:
    rows, gains = (N, 1) if op == "hc_head_norm" else (N * (N + 2), 3)
    return {
        "fn": torch.randn(rows, N * D, generator=g) / (N * D) ** 0.5,
        "scale": 0.5 + torch.rand(gains, generator=g),
        "base": torch.randn(rows, generator=g),
        "norm": (1 + 0.1 * torch.randn(D, generator=g)).to(torch.bfloat16),
    }
