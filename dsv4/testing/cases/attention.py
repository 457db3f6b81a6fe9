"""Inputs of the attention kernels: a step of some requests, and the cache as it finds it.

Everything a kernel must not read is poison: bytes of 0xFF, which are NaN as a code, as a scale and
as BF16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dsv4.core.kv_layout import KvRecord
from dsv4.testing.cases.cache import EPS, page_table, step_rows
from dsv4.testing.cases.norm import angles, norm_weight, vectors

POISON = 0xFF
SCALE_BYTES = (117, 122)  # of a record's groups: with any code, numbers of the size of a normed KV


@dataclass(frozen=True)
class AttentionCase:
    """Sizes of a step; `args` draws its tensors.

    requests  (tokens before the step, tokens of the step) of each request
    topk      width of the entry list (CSA); None: every visible entry (HCA)
    """

    requests: Sequence[tuple[int, int]]
    H: int = 16
    C: int = 128
    rows: int = 16
    ratio: int = 4
    per_page: int = 8
    topk: int | None = None
    padding: int = 0
    is_rotated: bool = True
    rope_dim: int = 64
    seed: int = 0

    def args(self, device: str = "cpu") -> dict[str, Any]:
        """Arguments of sparse_attn_decode and of sparse_attn_prefill, and of those to FP8."""
        g = Generator(device).manual_seed(self.seed)
        spans = [(s, start, n) for s, (start, n) in enumerate(self.requests)]
        rows = {k: v.to(device) for k, v in step_rows(spans, self.padding).items()}
        T, slots = len(rows["slot"]), len(self.requests) + 1
        record = KvRecord(self.C, self.rope_dim)
        q = torch.randn(T, self.H, self.C, generator=g, device=device)
        q[rows["slot"] < 0] = float("nan")
        table, pages = self._pages(record, g, device)
        step, window = self._step(record, rows["slot"] < 0, g), self._window(record, slots, g)
        sink = torch.randn(self.H, generator=g, device=device)
        angle = rows["position"][:, None] * 0.37 ** torch.arange(
            self.rope_dim // 2, device=device, dtype=torch.float64
        )
        cos, sin = angle.cos().float(), angle.sin().float()
        names = ("slot", "position", "first_row", "first_position")
        return {
            "q": q.to(torch.bfloat16), "step": step, "window": window, "pages": pages,
            "page_table": table,
            "entries": self._entries(rows, g), **{name: rows[name] for name in names},
            "sink": sink, "cos": cos if self.is_rotated else None,
            "sin": sin if self.is_rotated else None, "scale": self.C**-0.5, "rows": self.rows,
            "rope_dim": self.rope_dim, "ratio": self.ratio, "entries_per_page": self.per_page,
        }  # fmt: skip

    def _step(self, record: KvRecord, is_padding: Tensor, g: Generator) -> Tensor:
        T = len(is_padding)
        if T == 0:
            return torch.empty(0, dtype=torch.uint8, device=is_padding.device)
        page = random_pages(record, 1, T, g, is_padding.device)
        poison_rows(record, page, T, is_padding[None])
        return page[0]

    def _window(self, record: KvRecord, slots: int, g: Generator) -> Tensor:
        """Rings that hold the last tokens before the step; the last slot is nobody's."""
        window = random_pages(record, slots, self.rows, g, g.device)
        live = torch.zeros(slots, self.rows, dtype=torch.bool, device=g.device)
        for s, (start, _) in enumerate(self.requests):
            at = torch.arange(max(0, start - self.rows), start, device=g.device)
            live[s, at % self.rows] = True
        poison_rows(record, window, self.rows, ~live)
        return window

    def _pages(self, record: KvRecord, g: Generator, device: str) -> tuple[Tensor, Tensor]:
        counts = [(start + n) // self.ratio for start, n in self.requests]
        max_pages = -(-max(counts, default=0) // self.per_page)
        table = page_table(len(counts) + 1, max_pages, self.seed).to(device)
        pages = random_pages(record, table.numel() + 1, self.per_page, g, device)
        live = torch.zeros(len(pages), self.per_page, dtype=torch.bool, device=device)
        for s, count in enumerate(counts):
            used = -(-count // self.per_page)
            entry = torch.arange(count, device=device)
            live[table[s, entry // self.per_page].long(), entry % self.per_page] = True
            table[s, used:] = 0
        table[len(counts) :] = 0
        poison_rows(record, pages, self.per_page, ~live)
        return table, pages

    def _entries(self, rows: dict[str, Tensor], g: Generator) -> Tensor | None:
        """As many visible entries as fit, ascending, then -1."""
        if self.topk is None:
            return None
        visible = (rows["position"] + 1) // self.ratio
        width = max(int(visible.max()) if len(visible) else 0, self.topk)
        rank = torch.rand(len(visible), width, generator=g, device=visible.device)
        rank += torch.arange(width, device=visible.device) >= visible[:, None]
        chosen = rank.argsort(dim=1)[:, : self.topk]
        far = width + 1
        chosen = torch.where(chosen < visible[:, None], chosen, far).sort(dim=1).values
        return torch.where(chosen == far, -1, chosen).contiguous()


def random_pages(
    record: KvRecord, count: int, num_rows: int, g: Generator, device: str | torch.device
) -> Tensor:
    """Pages of records of finite numbers, uint8 [count, stride]; their padding is poison."""
    stride, size = record.page_bytes(num_rows), record.data_bytes
    pages = torch.full((count, stride), POISON, dtype=torch.uint8, device=device)
    data = pages[:, : num_rows * size].unflatten(1, (num_rows, size))
    sign = torch.randint(0, 2, (*data.shape[:2], record.nope_dim), generator=g, device=device)
    code = torch.randint(0, 127, sign.shape, generator=g, device=device)
    data[..., : record.nope_dim] = (code + 128 * sign).to(torch.uint8)
    shape = (*data.shape[:2], record.rope_dim)
    rope = torch.randn(shape, generator=g, device=device).to(torch.bfloat16)
    data[..., record.nope_dim :] = rope.view(torch.uint8)
    scales = pages[:, num_rows * size : num_rows * record.nbytes].unflatten(1, (num_rows, -1))
    shape = (*data.shape[:2], record.num_scales)
    byte = torch.randint(*SCALE_BYTES, shape, generator=g, device=device)
    scales[..., : record.num_scales] = byte.to(torch.uint8)
    return pages


def poison_rows(record: KvRecord, pages: Tensor, num_rows: int, dead: Tensor) -> None:
    """Overwrite the records where `dead` [count, num_rows] says so."""
    size = record.data_bytes
    pages[:, : num_rows * size].unflatten(1, (num_rows, size))[dead] = POISON
    pages[:, num_rows * size : num_rows * record.nbytes].unflatten(1, (num_rows, -1))[dead] = POISON


def latent_kv_args(
    num_tokens: int, latent: int, head_dim: int = 512, rope_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16, is_exact: bool = False, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of latent_kv_norm_pack."""
    shape = num_tokens, latent + head_dim
    x = vectors(*shape, dtype=dtype, is_exact=is_exact, device=device)
    g = Generator().manual_seed(3)
    position = torch.randint(0, 300, (num_tokens,), generator=g)
    return {
        "x": x, "q_norm": norm_weight(latent, device=device),
        "kv_norm": norm_weight(head_dim, seed=2, device=device),
        **angles(300, rope_dim, device), "position": position.to(device), "eps": EPS,
    }  # fmt: skip


def aot_calls() -> dict[str, dict[str, Any]]:
    """A call of every binary of the attention kernels at the sizes of Flash."""
    csa, hca = (4, 64, 512), (128, 2, None)
    few, many = [(2048, 1)], [(2048, 1)] * 40
    kinds = {"16-csa": (16, csa, few), "64-hca": (64, hca, many)}
    calls: dict[str, dict[str, Any]] = {
        "kv_step_pack": {"kv": torch.randn(8, 512).to(torch.bfloat16), "rope_dim": 64}
    }
    for latent in (1024, 1536):
        calls[f"latent_kv_norm_pack/{latent}"] = latent_kv_args(8, latent)
    for name, (H, (ratio, per_page, topk), requests) in kinds.items():
        args = AttentionCase(requests, H, 512, 128, ratio, per_page, topk).args()
        calls[f"sparse_attn_decode/{name}"] = args
        calls[f"sparse_attn_prefill/{name}"] = args
        calls[f"sparse_attn_decode_fp8/{name}"] = args
        calls[f"sparse_attn_prefill_fp8/{name}"] = args
    return calls
