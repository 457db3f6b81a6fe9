"""Inputs of the norm kernels. Rows that no kernel may touch are poison: NaN, or bytes of 0xFF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.testing.cases.cache import EPS, Span, step_rows

BF16 = torch.bfloat16
FORMS = ("fp8", "mxfp4", "nvfp4")


def vectors(
    *shape: int, dtype: torch.dtype = BF16, is_exact: bool = False, seed: int = 0,
    device: str = "cpu",
) -> Tensor:  # fmt: skip
    """Normal numbers, every vector of another magnitude, with zeros of both signs.

    is_exact  multiples of 1/4 up to 2 instead, whose squares FP32 adds exactly in any order
    """
    g = Generator().manual_seed(seed)
    if is_exact:
        x = torch.randint(-8, 9, shape, generator=g) / 4
    else:
        x = torch.randn(shape, generator=g)
        x *= 2.0 ** torch.randint(-8, 8, (*shape[:-1], 1), generator=g)
    x[..., 3::17], x[..., 5::31] = 0.0, -0.0
    return x.to(dtype).to(device)


def norm_weight(dims: int, seed: int = 1, device: str = "cpu") -> Tensor:
    """A weight of RMSNorm, [dims] BF16."""
    g = Generator().manual_seed(seed)
    return (1 + 0.1 * torch.randn(dims, generator=g)).to(BF16).to(device)


def angles(num_positions: int, rope_dim: int = 64, device: str = "cpu") -> dict[str, Tensor]:
    """cos and sin [S, R/2] FP32 of every position."""
    freqs = 1e4 ** -(torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    x = torch.arange(num_positions, dtype=torch.float64)[:, None] * freqs
    return {"cos": x.cos().float().to(device), "sin": x.sin().float().to(device)}


def head_args(
    num_tokens: int, num_heads: int, head_dim: int = 512, rope_dim: int = 64,
    dtype: torch.dtype = BF16, is_exact: bool = False, device: str = "cpu", name: str = "q",
) -> dict[str, Any]:  # fmt: skip
    """Arguments that q_norm_rope (without its eps) and the inverse rotations share."""
    g = Generator().manual_seed(2)
    x = vectors(num_tokens, num_heads, head_dim, dtype=dtype, is_exact=is_exact, device=device)
    position = torch.randint(0, 300, (num_tokens,), generator=g)
    position[:1] = 0  # where every sine is a zero
    return {name: x, **angles(300, rope_dim, device), "position": position.to(device)}


def kv_args(
    spans: Sequence[Span], padding: int = 0, num_slots: int = 4, head_dim: int = 512,
    rope_dim: int = 64, rows: int = 16, dtype: torch.dtype = BF16, is_exact: bool = False,
    device: str = "cpu", seed: int = 0, accepted: Mapping[int, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of kv_norm_rope_quant_insert for one step; padding rows hold NaN.

    accepted  by slot, the length of a request whose last tokens are drafts that were rejected
    """
    step = step_rows(spans, padding)
    for slot, end in (accepted or {}).items():
        step["end_position"][step["slot"] == slot] = end
    kv = vectors(len(step["slot"]), head_dim, dtype=dtype, is_exact=is_exact, seed=seed)
    kv[len(kv) - padding :] = torch.nan
    stride = KvRecord(head_dim, rope_dim).page_bytes(rows)
    length = max((start + n for _, start, n in spans), default=1)
    return {
        "kv": kv.to(device), "norm": norm_weight(head_dim, device=device),
        **angles(length, rope_dim, device),
        "window": torch.full((num_slots, stride), 0xFF, dtype=torch.uint8, device=device),
        **{k: step[k].to(device) for k in ("slot", "position", "end_position")},
        "rows": rows, "eps": EPS,
    }  # fmt: skip


def norm_calls(
    num_tokens: int, dims: int = 256, heads: int = 8, head_dim: int = 512, rows: int = 16,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Arguments of every op, "op" or "op/variant"."""
    x, weight = vectors(num_tokens, dims, device=device), norm_weight(dims, device=device)
    normed = {"x": x, "weight": weight, "eps": EPS}
    share = torch.tensor(0.01, device=device)
    calls = {"rms_norm": normed}
    for form in FORMS:
        rest = {"form": form, "global_scale": share if form == "nvfp4" else None}
        calls[f"rms_norm_quant/{form}"] = normed | rest
    q = head_args(num_tokens, heads, head_dim, device=device)
    o = head_args(num_tokens, heads, head_dim, device=device, name="o")
    kv = kv_args([(1, 0, num_tokens)], head_dim=head_dim, rows=rows, device=device)
    return calls | {
        "q_norm_rope": q | {"eps": EPS},
        "kv_norm_rope_quant_insert": kv,
        "q_kv_norm_rope_insert": {"q": q["q"], **kv},
        "inverse_rope": o,
        "inverse_rope_quant": o | {"group": 128},
    }


def aot_calls() -> dict[str, dict[str, Any]]:
    """A call of every kernel at the sizes of V4-Flash and V4-Pro."""
    flash = norm_calls(8, 4096, 64, rows=128)
    pro = norm_calls(8, 7168, 128, rows=128)
    latent = norm_calls(8, 1024, 8), norm_calls(8, 1536, 8)
    calls = dict(flash)
    for name, args in pro.items():
        calls[f"{name}{'_' if '/' in name else '/'}pro"] = args
    for size, made in zip(("flash", "pro"), latent, strict=True):
        calls[f"rms_norm/{size}_latent"] = made["rms_norm"]
        calls[f"rms_norm_quant/fp8_{size}_latent"] = made["rms_norm_quant/fp8"]
    return calls
