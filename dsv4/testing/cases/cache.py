"""Inputs of the cache kernels: whole requests, and the steps they arrive in.

Everything a kernel must not read is poison: NaN rows, bytes of 0xFF.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.kv_layout import IndexKeys, IndexRecord, KvRecord

Span = tuple[int, int, int]  # slot, position of the first new token, number of new tokens

EPS = 1e-6
DEAD = -1e30  # a score that softmax gives no weight at all


def step_rows(spans: Sequence[Span], padding: int = 0) -> dict[str, Tensor]:
    """Metadata of the token rows of a step, [T] int64 each; `padding` rows with slot -1 follow."""
    columns: dict[str, list[int]] = {
        "slot": [], "position": [], "end_position": [], "first_row": [], "first_position": [],
    }  # fmt: skip
    for slot, start, n in spans:
        row = len(columns["slot"])
        columns["slot"] += [slot] * n
        columns["position"] += range(start, start + n)
        columns["end_position"] += [start + n] * n
        columns["first_row"] += [row] * n
        columns["first_position"] += [start] * n
    for name, column in columns.items():
        column += [-1 if name == "slot" else 0] * padding
    return {name: torch.tensor(x, dtype=torch.int64) for name, x in columns.items()}


def chunks(length: int, sizes: Sequence[int], slot: int = 0) -> list[list[Span]]:
    """Steps of one request that cut 0 .. length - 1 into pieces of `sizes`, repeated."""
    steps, start, i = [], 0, 0
    while start < length:
        n = min(sizes[i % len(sizes)], length - start)
        steps.append([(slot, start, n)])
        start, i = start + n, i + 1
    return steps


def page_table(num_slots: int, max_pages: int, seed: int = 0) -> Tensor:
    """Pages 1, 2, ... in random order, [slots, max_pages] int32; page 0 is nobody's."""
    g = Generator().manual_seed(seed)
    pages = torch.randperm(num_slots * max_pages, generator=g) + 1
    return pages.view(num_slots, max_pages).to(torch.int32)


@dataclass(frozen=True)
class WindowCase:
    """Window KV of whole requests and the ring it goes to.

    kv      [slots, length, C]
    window  [slots, stride] uint8
    """

    kv: Tensor
    window: Tensor
    rows: int
    rope_dim: int = 64

    @classmethod
    def random(
        cls, num_slots: int, length: int, head_dim: int, rows: int,
        dtype: torch.dtype = torch.bfloat16, seed: int = 0,
    ) -> WindowCase:  # fmt: skip
        """Normal numbers, every row of another magnitude; zeros, negative zeros, one huge value."""
        g = Generator().manual_seed(seed)
        kv = torch.randn(num_slots, length, head_dim, generator=g)
        kv *= 2.0 ** torch.randint(-14, 12, (num_slots, length, 1), generator=g)
        kv[:, ::5, 3::17], kv[:, 1::7, :64], kv[:, 2::9, 70] = -0.0, 0.0, 3e38
        stride = KvRecord(head_dim, 64).page_bytes(rows)
        window = torch.full((num_slots, stride), 0xFF, dtype=torch.uint8)
        return cls(kv.to(dtype), window, rows)

    def fresh(self, device: str = "cpu") -> WindowCase:
        """The same inputs and a ring of its own on `device`."""
        return replace(self, kv=self.kv.to(device), window=self.window.clone().to(device))

    def append_args(self, spans: Sequence[Span], padding: int = 0) -> dict[str, Any]:
        """Arguments of kv_window_append for one step."""
        rows = _on(self.kv, step_rows(spans, padding))
        names = ("slot", "position", "end_position")
        return {
            "kv": _rows_of(self.kv, rows), "window": self.window,
            **{name: rows[name] for name in names}, "rows": self.rows, "rope_dim": self.rope_dim,
        }  # fmt: skip


@dataclass(frozen=True)
class CompressorCase:
    """Compressor rows of whole requests, and where their entries go.

    kappa, gamma  [slots, length, width]
    state         [slots, 2, rows, width], poison until written
    pages         [P, stride] uint8; of KV records, or of index keys where `keys` says so
    """

    kappa: Tensor
    gamma: Tensor
    state: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor
    pages: Tensor
    page_table: Tensor
    ratio: int
    entries_per_page: int
    dtype: torch.dtype
    keys: IndexKeys | None = None
    is_rotated: bool = False

    def fresh(self, device: str = "cpu") -> CompressorCase:
        """The same inputs, with a state and pages of its own, on `device`."""
        tensors = {
            name: value.clone().to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def insert_args(self, spans: Sequence[Span], padding: int = 0) -> dict[str, Any]:
        """Arguments of compressor_insert, or of index_key_insert for a case of index keys."""
        rows = _on(self.kappa, step_rows(spans, padding))
        names = ("slot", "position", "first_row", "first_position")
        index = {} if self.keys is None else {"keys": self.keys, "is_rotated": self.is_rotated}
        return {
            "kappa": _rows_of(self.kappa, rows), "gamma": _rows_of(self.gamma, rows),
            "state": self.state, "norm": self.norm, "cos": self.cos, "sin": self.sin,
            "pages": self.pages, "page_table": self.page_table,
            **{name: rows[name] for name in names}, "ratio": self.ratio,
            "entries_per_page": self.entries_per_page, "eps": EPS, "dtype": self.dtype, **index,
        }  # fmt: skip

    def append_args(self, spans: Sequence[Span], padding: int = 0) -> dict[str, Any]:
        """Arguments of compressor_state_append for one step."""
        rows = _on(self.kappa, step_rows(spans, padding))
        names = ("slot", "position", "end_position")
        return {
            "kappa": _rows_of(self.kappa, rows), "gamma": _rows_of(self.gamma, rows),
            "state": self.state, **{name: rows[name] for name in names},
        }  # fmt: skip


def compressor_case(
    ratio: int, dims: int, length: int, num_slots: int = 1, *, overlap: bool | None = None,
    page_tokens: int = 128, dtype: torch.dtype = torch.bfloat16, is_exact: bool = False,
    keys: IndexKeys | None = None, is_rotated: bool = False, rope_dim: int = 64, seed: int = 0,
) -> CompressorCase:  # fmt: skip
    """Rows of `num_slots` requests of `length` tokens; windows of ratio 4 overlap unless told.

    is_exact  values for which FP32 sums and the softmax are exact in any order
    """
    g = Generator().manual_seed(seed)
    halves = 2 if (ratio == 4 if overlap is None else overlap) else 1
    draw = _exact_rows if is_exact else _random_rows
    kappa, gamma = draw(num_slots, length, halves, dims, ratio, g)
    max_pages, per_page = -(-length // page_tokens), page_tokens // ratio
    record = KvRecord(dims, rope_dim) if keys is None else IndexRecord(dims, keys)
    cos, sin = _angles(-(-length // ratio), ratio, rope_dim)
    num_pages = num_slots * max_pages + 1
    return CompressorCase(
        kappa, gamma,
        torch.full((num_slots, 2, halves * ratio, halves * dims), float("nan")),
        (1 + 0.1 * torch.randn(dims, generator=g)).to(torch.bfloat16), cos, sin,
        torch.full((num_pages, record.page_bytes(per_page)), 0xFF, dtype=torch.uint8),
        page_table(num_slots, max_pages, seed), ratio, per_page, dtype, keys, is_rotated,
    )  # fmt: skip


def step_append_args(
    window: WindowCase, entries: CompressorCase | None, index: CompressorCase | None,
    spans: Sequence[Span], padding: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of cache_step_append for one step of a layer."""
    args = dict.fromkeys(f"{x}{y}" for x in ("", "index_") for y in ("kappa", "gamma", "state"))
    for prefix, case in (("", entries), ("index_", index)):
        if case is not None:
            own = case.append_args(spans, padding)
            args |= {f"{prefix}{name}": own[name] for name in ("kappa", "gamma", "state")}
    return args | window.append_args(spans, padding)


def insert_both_args(
    entries: CompressorCase, index: CompressorCase, spans: Sequence[Span], padding: int = 0
) -> dict[str, Any]:
    """Arguments of entry_and_key_insert for one step of a layer."""
    own = index.insert_args(spans, padding)
    names = ("kappa", "gamma", "state", "norm", "pages")
    its = {f"index_{name}": own[name] for name in names}
    return own | its | entries.insert_args(spans, padding)


def cache_calls(
    num_tokens: int, head_dim: int = 128, page_tokens: int = 128, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Arguments of every cache op, "op" or "op/variant", for the first tokens of one request.

    Stores hold bytes that stand for finite numbers.
    """
    spans = [(0, 0, num_tokens)]
    length = max(num_tokens, 8)
    rows = _on(torch.empty(0, device=device), step_rows(spans))
    window = WindowCase.random(2, length, head_dim, rows=128 if head_dim == 512 else 16)
    window = window.fresh(device)
    window.window.fill_(0x41)
    made = {
        "csa": compressor_case(4, head_dim, length, 2, page_tokens=page_tokens),
        "hca": compressor_case(128, head_dim, length, 2, page_tokens=page_tokens),
        "fp8": compressor_case(4, 128, length, 2, page_tokens=page_tokens, keys="fp8"),
        "mxfp4": compressor_case(
            4, 128, length, 2, page_tokens=page_tokens, keys="mxfp4", is_rotated=True
        ),
    }  # fmt: skip
    made = {name: case.fresh(device) for name, case in made.items()}
    calls = {"kv_window_append": window.append_args(spans)}
    for name, case in made.items():
        case.pages.fill_(0x41)
        is_key, per_page = case.keys is not None, case.entries_per_page
        op = "index_key_insert" if is_key else "compressor_insert"
        calls[f"{op}/{name}"] = case.insert_args(spans)
        kind = {"keys": case.keys} if is_key else {"rope_dim": 64}
        calls[f"{'gather_index_keys' if is_key else 'gather_entries'}/{name}"] = {
            "pages": case.pages, "page_table": case.page_table, "slot": rows["slot"],
            "entry": rows["position"], "entries_per_page": per_page,
            "head_dim": 128 if is_key else head_dim, "dtype": torch.bfloat16, **kind,
        }  # fmt: skip
    record = KvRecord(head_dim)
    at = {"slot": rows["slot"], "position": rows["position"]}
    return calls | layer_calls(window, made, spans) | {
        "compressor_state_append": made["csa"].append_args(spans),
        "cache_reset": {"state": made["csa"].state, "slot": rows["slot"]},
        "gather_window": {
            "window": window.window, **at, "rows": window.rows, "head_dim": head_dim,
            "rope_dim": 64, "dtype": torch.bfloat16,
        },
        "gather_records": {
            "store": window.window, "page": rows["slot"], "row": rows["position"],
            "num_rows": window.rows, "value_bytes": record.data_bytes,
            "scale_bytes": record.scale_bytes,
        },
    }  # fmt: skip


def layer_calls(
    window: WindowCase, made: dict[str, CompressorCase], spans: Sequence[Span]
) -> dict[str, dict[str, Any]]:
    """The ops that write for several stores of a layer."""
    csa, fp8 = made["csa"], made["fp8"]
    calls = {
        f"entry_and_key_insert/{keys}": insert_both_args(csa, made[keys], spans)
        for keys in ("fp8", "mxfp4")
    }
    return calls | {
        "cache_step_append/swa": step_append_args(window, None, None, spans),
        "cache_step_append/hca": step_append_args(window, made["hca"], None, spans),
        "cache_step_append/csa": step_append_args(window, csa, fp8, spans),
    }


def aot_calls() -> dict[str, dict[str, Any]]:
    """A call of every cache kernel at the sizes of V4-Flash, insertions in short and long steps."""
    calls = cache_calls(8, head_dim=512, page_tokens=256)
    long = cache_calls(300, head_dim=512, page_tokens=256)
    return calls | {f"{name}/prefill": x for name, x in long.items() if "_insert/" in name}


def _random_rows(
    slots: int, length: int, halves: int, dims: int, ratio: int, g: Generator
) -> tuple[Tensor, Tensor]:
    kappa, gamma = torch.randn(2, slots, length, halves * dims, generator=g)
    return kappa, 2 * gamma


def _exact_rows(
    slots: int, length: int, halves: int, dims: int, ratio: int, g: Generator
) -> tuple[Tensor, Tensor]:
    """Values on a grid of 1/4; in every window and channel 1, 2, 4 or 8 equal scores, others DEAD.

    With overlap the window before counts with 0 or 2 scores and the window itself with 2.
    """
    windows = -(-length // ratio)
    shape = (slots, windows, ratio, halves, dims)
    rank = torch.rand(shape, generator=g).argsort(dim=2).argsort(dim=2)
    exponent = torch.randint(0, 4, (slots, windows, 1, halves, dims), generator=g)
    live = rank < 2**exponent
    if halves == 2:
        live = rank < 2
        live[:, :, :, :1] &= exponent[:, :, :, :1] > 1
    level = torch.randint(-4, 5, (slots, 1, 1, 1, dims), generator=g) / 4
    gamma = torch.where(live, level, DEAD).flatten(3).flatten(1, 2)[:, :length]
    kappa = torch.randint(-8, 9, (slots, length, halves * dims), generator=g) / 4
    return kappa, gamma.contiguous()


def _angles(num_entries: int, ratio: int, rope_dim: int) -> tuple[Tensor, Tensor]:
    freqs = 1e4 ** -(torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    angles = torch.arange(num_entries, dtype=torch.float64)[:, None] * ratio * freqs
    return angles.cos().float(), angles.sin().float()


def _on(like: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(like.device) for name, x in rows.items()}


def _rows_of(history: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """[slots, length, width] -> [T, width], NaN in padding rows."""
    slot = rows["slot"]
    taken = history[slot.clamp(min=0), rows["position"]]
    return taken.masked_fill((slot < 0)[:, None], float("nan"))
