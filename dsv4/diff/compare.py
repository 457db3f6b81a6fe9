"""The comparison of two dumps, tap by tap in execution order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import inf

import torch
from torch import Tensor

from dsv4.core.errors import RequestError
from dsv4.diff.dump import DTYPES, DumpInfo, TapDump
from dsv4.diff.limits import Limit, Limits

ROUNDED = {  # by DumpInfo.quant
    "cache": "keys and values to FP8 and the indexer to MXFP4, as the official cache",
    "production": "keys, values and index keys to FP8, as the paged cache",
}
ROW_FACTOR = 8.0  # a single row may be this many limits off; measured: see limits.toml


@dataclass(frozen=True)
class TapResult:
    """How one tap of B stands to the same tap of A.

    kind     "float", "set", "bitwise", or "shape" when the two cannot be compared
    ok       whether it is within `limit`
    cos, rel_rms, max_abs   of floats: cosine, |a - b| / |a|, largest |a - b|; over what is finite
    num_differ, num_total   elements that differ: of sets and bitwise taps, or non-finite ones
    num_skipped  rows not judged: their tokens chose otherwise before, see compare_dumps
    where    the place of the largest error, {"token": 4, "head": 17, "channel": 3}
    share    share of the squared error in the first places of `where` (all but the last)
    note     what else must be said, "" for nothing
    """

    name: str
    kind: str
    ok: bool
    limit: float
    cos: float | None = None
    rel_rms: float | None = None
    max_abs: float | None = None
    num_differ: int = 0
    num_total: int = 0
    num_skipped: int = 0
    where: dict[str, int] = field(default_factory=dict)
    share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class DiffReport:
    """All taps that both dumps have, in the execution order of A, and the names only one has."""

    dtype: str
    results: tuple[TapResult, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def first_divergence(self) -> TapResult | None:
        """The first tap outside its limit, None when there is none."""
        return next((r for r in self.results if not r.ok), None)

    @property
    def worst_before(self) -> float:
        """Largest relative rms of the float taps before the first divergence, or of all."""
        worst = 0.0
        for r in self.results:
            if not r.ok:
                break
            worst = max(worst, r.rel_rms or 0.0)
        return worst


def compare_dumps(
    a: TapDump, b: TapDump, limits: Limits, globs: Sequence[str] = ("*",)
) -> DiffReport:
    """Compare every tap that both have and that matches one of `globs`.

    A choice at a near tie (an expert, an index entry) may differ within its limit, and from there
    on that token computes something else. Its rows are not judged in later taps; every result
    counts them.

    Raises RequestError when the dumps are of different prompts or models, or share no tap.
    """
    for name, left, right in (
        ("ids", a.info.ids, b.info.ids),
        ("config", a.info.config, b.info.config),
    ):
        if left != right:
            raise RequestError(
                name, f"the {name} of {a.path.name}: {_short(left)}", _short(right),
                "make both dumps from the same prompt and model",
            )  # fmt: skip
    dtype = max(a.info.dtype, b.info.dtype, key=DTYPES.index)
    wanted_a, wanted_b = (
        [n for n in d.names if any(fnmatchcase(n, g) for g in globs)] for d in (a, b)
    )
    common = [n for n in wanted_a if n in set(wanted_b)]
    if not common:
        raise RequestError("taps", "taps that both dumps have", f"{len(wanted_a)} and "
                           f"{len(wanted_b)} with none in common")  # fmt: skip
    notes = []
    if a.info.quant != b.info.quant:
        notes.append(f"A rounds {_rounded(a.info)}, B {_rounded(b.info)}")
    if a.info.parts != b.info.parts:
        left, right = (", ".join(d.info.parts) or "nothing" for d in (a, b))
        notes.append(f"A runs {left} as parts, B {right}")
    forked: set[int] = set()
    return DiffReport(
        dtype,
        tuple(_compare_tap(a, b, n, limits.rule(n), dtype, forked) for n in common),
        tuple(n for n in wanted_a if n not in set(wanted_b)),
        tuple(n for n in wanted_b if n not in set(wanted_a)),
        tuple(notes),
    )


def compare_tensors(name: str, a: Tensor, b: Tensor, rule: Limit, dtype: str) -> TapResult:
    """Compare two tensors of one name under `rule`, for runs in `dtype`."""
    limit = rule.of(dtype)
    if rule.kind == "set" and a.shape[:-1] == b.shape[:-1] and a.dim():
        width = max(a.shape[-1], b.shape[-1])  # one may list padding that the other leaves out
        a, b = (torch.nn.functional.pad(x, (0, width - x.shape[-1]), value=-1) for x in (a, b))
    if a.shape != b.shape:
        note = f"shapes differ: A {list(a.shape)}, B {list(b.shape)}"
        return TapResult(name, "shape", False, limit, note=note)
    if a.is_floating_point() != b.is_floating_point():
        return TapResult(name, "shape", False, limit, note=f"A is {a.dtype}, B {b.dtype}")
    if rule.kind == "set":
        return _compare_sets(name, a, b, limit)
    if rule.kind == "bitwise" or not a.is_floating_point():
        return _compare_bits(name, a, b, rule)
    return _compare_floats(name, a, b, rule, limit)


def _rounded(info: DumpInfo) -> str:
    """What a run rounds, in words."""
    nothing = f"nothing beyond {info.dtype}"
    return {"": nothing, **ROUNDED}.get(info.quant, repr(info.quant))


def _compare_tap(
    a: TapDump, b: TapDump, name: str, rule: Limit, dtype: str, forked: set[int]
) -> TapResult:
    """Compare one tap; the tokens whose choices differ in it join `forked`."""
    left, right = a.tensor(name), b.tensor(name)
    skip = torch.zeros(len(left) if left.dim() else 0, dtype=torch.bool)
    ids_name = f"{name.rpartition('.')[0]}.{rule.by_ids}"
    if rule.by_ids and ids_name in a.names and ids_name in b.names:
        ids_left, ids_right = a.tensor(ids_name), b.tensor(ids_name)
        if left.shape == right.shape == ids_left.shape == ids_right.shape:
            left, right = _sort_by(left, ids_left), _sort_by(right, ids_right)
            # Where other ids were chosen there is nothing to compare: the ids' own tap says so.
            skip[list(_rows_that_differ(ids_left, ids_right))] = True
    if left.shape == right.shape and rule.axes[:1] == ("token",):
        skip[[t for t in forked if t < len(skip)]] = True
        left, right = left.clone(), right.clone()
        left[skip] = right[skip] = -1 if rule.kind == "set" else 0
    result = compare_tensors(name, left, right, rule, dtype)
    result = replace(result, num_skipped=int(skip.sum()))
    if result.kind == "set" and result.ok and result.num_differ:
        forked |= _rows_that_differ(left, right)
    return result


def _rows_that_differ(a: Tensor, b: Tensor) -> set[int]:
    """Rows of two lists of choices that are not the same set; padding and order mean nothing."""
    size = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(x, (0, size - x.shape[-1]), value=-1) for x in (a, b))
    return set((a.sort(-1).values != b.sort(-1).values).any(-1).nonzero()[:, 0].tolist())


def _sort_by(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids.argsort(dim=-1, stable=True))


def _compare_sets(name: str, a: Tensor, b: Tensor, limit: float) -> TapResult:
    """Rows as multisets of ids from 0 up; an id counts once for each row it is missing in."""
    a, b = (torch.atleast_2d(x).flatten(0, -2).long() for x in (a, b))
    width = int(max(a.max(), b.max())) + 1 if a.numel() else 1
    keys = []
    for x in (a, b):
        row = torch.arange(len(x))[:, None].expand_as(x)
        keys.append((row * width + x)[x >= 0])
    values, inverse = torch.unique(torch.cat(keys), return_inverse=True)
    counts = [
        torch.bincount(part, minlength=len(values))
        for part in inverse.split([len(k) for k in keys])
    ]
    surplus = counts[0] - counts[1]
    differ = int(max(surplus.clamp(min=0).sum(), (-surplus).clamp(min=0).sum()))
    total = max(len(k) for k in keys)
    where = {}
    if differ:
        per_row = torch.zeros(len(a), dtype=torch.long)
        per_row.index_add_(0, torch.div(values, width, rounding_mode="floor"), surplus.abs())
        where = {"token": int(per_row.argmax())}
    ok = differ <= limit * total
    return TapResult(name, "set", ok, limit, num_differ=differ, num_total=total, where=where)


def _compare_bits(name: str, a: Tensor, b: Tensor, rule: Limit) -> TapResult:
    differs = a != b
    count = int(differs.sum())
    where = _place(int(differs.flatten().long().argmax()), a.shape, rule.axes) if count else {}
    return TapResult(
        name, "bitwise", count == 0, 0.0, num_differ=count, num_total=a.numel(), where=where
    )


def _compare_floats(name: str, a: Tensor, b: Tensor, rule: Limit, limit: float) -> TapResult:
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    # Equal infinities (masked scores) agree; NaN never does, in one dump or in both.
    agree = finite | (x == y)
    broken = int((~agree).sum())
    x, y = (torch.where(finite, v, 0.0) for v in (x, y))
    d = x - y
    norm_x, norm_y, norm_d = (float(v.norm()) for v in (x, y, d))
    rel = norm_d / norm_x if norm_x else (inf if norm_d else 0.0)
    cos = float((x * y).sum()) / (norm_x * norm_y) if norm_x and norm_y else float(norm_d == 0)
    row, row_rel = _worst_row(x, d)
    note, error = "", d.square()
    if broken:
        note = f"{int(a.isnan().sum())} NaN in A, {int(b.isnan().sum())} in B; {broken} differ"
        error = (~agree).double()
    elif rel <= limit and row_rel > ROW_FACTOR * limit:
        kind = rule.axes[0] if rule.axes else "row"
        note = f"{kind} {row} alone is off by {row_rel:.1e}, {ROW_FACTOR:g} times the limit allowed"
        error = torch.zeros_like(error).index_copy_(0, torch.tensor([row]), error[row : row + 1])
    where, share = _blame(error, rule.axes)
    ok = broken == 0 and rel <= limit and row_rel <= ROW_FACTOR * limit
    return TapResult(
        name, "float", ok, limit, cos=cos, rel_rms=rel,
        max_abs=float(d.abs().max()) if d.numel() else 0.0, num_differ=broken,
        num_total=a.numel(), where=where, share=share, note=note,
    )  # fmt: skip


def _worst_row(x: Tensor, d: Tensor) -> tuple[int, float]:
    """The row with the largest error, relative to its own size or to the median row's if larger.

    One wrong token among many hardly moves the error of the whole tensor.
    """
    if x.dim() < 2 or not len(x):
        return 0, 0.0
    size, error = (v.reshape(len(v), -1).norm(dim=1) for v in (x, d))
    relative = error / size.clamp(min=float(size.median()))
    relative = torch.where(error == 0, torch.zeros_like(error), relative)
    row = int(relative.argmax())
    return row, float(relative[row])


def _blame(error: Tensor, axes: Sequence[str]) -> tuple[dict[str, int], float | None]:
    """The worst element of the row (of the token and head) with most error; that row's share."""
    total = float(error.sum())
    if not total:
        return {}, None
    rows = error.reshape(-1, error.shape[-1] if error.dim() else 1)
    row_sums = rows.sum(-1)
    worst = int(row_sums.argmax())
    flat = worst * rows.shape[1] + int(rows[worst].argmax())
    return _place(flat, error.shape, axes), float(row_sums[worst]) / total


def _place(flat: int, shape: Sequence[int], axes: Sequence[str]) -> dict[str, int]:
    index = torch.unravel_index(torch.tensor(flat), tuple(shape))
    names = axes if len(axes) == len(index) else [f"dim {n}" for n in range(len(index))]
    return {name: int(i) for name, i in zip(names, index, strict=True)}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
