"""A DiffReport as text for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from typing import Any

from dsv4.diff.compare import DiffReport, TapResult

SCHEMA = 1
MAX_NAMES = 8
HEADER = f"{'layer':5} {'sub-block':22} {'cos':9} {'rel-rms':9} {'max|d|':9} {'limit':8}"


def to_text(report: DiffReport, only_failures: bool = False) -> str:
    """The table, one line a tap, and the verdict."""
    first = report.first_divergence
    lines = [HEADER.rstrip()]
    for r in report.results:
        if r.ok and only_failures:
            continue
        lines.append(f"{_row(r)}  {'ok' if r.ok else _mark(r, first)}".rstrip())
        if r is first:
            lines += [f"       {line}" for line in _blame_lines(report, r)]
    return "\n".join([*lines, *_notes(report), _verdict(report)])


def to_summary(report: DiffReport) -> str:
    """What came closest to its limit, and the verdict: enough where nothing diverged."""
    floats = [r for r in report.results if r.rel_rms and r.limit]
    worst = max(floats, key=lambda r: (r.rel_rms or 0) / r.limit, default=None)
    text = "every tap is equal"
    if worst is not None:
        share = (worst.rel_rms or 0) / worst.limit
        text = f"{worst.name}, rel-rms {_figure(worst.rel_rms or 0)}, {share:.1%} of its limit"
    elif any(r.num_differ for r in report.results):
        text = "no float differs"
    return "\n".join([f"closest to its limit: {text}", *_notes(report), _verdict(report)])


def _notes(report: DiffReport) -> list[str]:
    lines = [f"note: {n}" for n in report.notes]
    skipped = max((r.num_skipped for r in report.results), default=0)
    if skipped:
        lines.append(f"note: {skipped} tokens chose otherwise within a limit, and are not judged "
                     "behind that choice")  # fmt: skip
    for which, names in (("A", report.only_a), ("B", report.only_b)):
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            lines.append(f"only in {which}: {', '.join(names[:MAX_NAMES])}{more}")
    return lines


def to_json(report: DiffReport) -> dict[str, Any]:
    """The report as plain data. Infinite figures are null."""
    first = report.first_divergence
    return {
        "schema": SCHEMA,
        "diverged": first is not None,
        "first_divergence": first.name if first else None,
        "worst_before": report.worst_before,
        "dtype": report.dtype,
        "taps": [_plain(asdict(r)) for r in report.results],
        "only_a": list(report.only_a),
        "only_b": list(report.only_b),
        "notes": list(report.notes),
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in row.items()}


def _split(name: str) -> tuple[str, str]:
    """("3", "attn.q") of "layers.3.attn.q", ("m0", "logits") of "mtp.0.logits"."""
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] in ("layers", "mtp"):
        return (parts[1] if parts[0] == "layers" else f"m{parts[1]}"), parts[2]
    return "-", name


def _row(r: TapResult) -> str:
    layer, block = _split(r.name)
    head = f"{layer:>3}   {block:22}"
    if r.kind == "float":
        cos, rel, top = r.cos or 0.0, r.rel_rms or 0.0, r.max_abs or 0.0
        return f"{head} {cos:<9.6f} {_figure(rel):9} {_figure(top):9} {_figure(r.limit):8}"
    if r.kind == "shape":
        return f"{head} {r.note:38}"
    limit = "bitwise" if r.kind == "bitwise" else f"{r.limit:.2g}"
    differ = f"{r.num_differ} of {r.num_total} differ"
    return f"{head} {differ:29} {limit:8}"


def _figure(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}"


def _mark(r: TapResult, first: TapResult | None) -> str:
    return "FIRST DIVERGENCE" if r is first else "diverged"


def _blame_lines(report: DiffReport, r: TapResult) -> list[str]:
    lines = []
    place = ", ".join(f"{k} {v}" for k, v in r.where.items())
    if r.share is not None and len(r.where) > 1:
        row, last = list(r.where.items())[:-1], list(r.where.items())[-1]
        text = ", ".join(f"{k} {v}" for k, v in row)
        place = f"{text}: {r.share:.0%} of the error, most in {last[0]} {last[1]}"
    if place:
        lines.append(place)
    if r.kind == "float" and r.limit and r.rel_rms is not None:
        lines.append(f"{r.rel_rms / r.limit:.3g} times its limit")
    if r.note and r.kind != "shape":
        lines.append(r.note)
    if report.results[0] is not r:
        lines.append(f"everything before it agrees to {_figure(report.worst_before)}")
    return lines


def _verdict(report: DiffReport) -> str:
    bad = sum(not r.ok for r in report.results)
    what = f"{len(report.results)} taps compared at {report.dtype} limits"
    first = report.first_divergence
    return f"{what}: {bad} diverged, first {first.name}" if first else f"{what}: all within limits"
