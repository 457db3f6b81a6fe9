"""Helpers for problem lists: printable text, bounded length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dsv4.core.errors import CheckpointProblem

_MAX_PER_KIND = 1000


def printable(text: object, limit: int = 120) -> str:
    """`text` for an error message: ASCII without control characters, cut to `limit`."""
    escaped = str(text).encode("unicode_escape").decode("ascii")
    return escaped if len(escaped) <= limit else escaped[: limit - 3] + "..."


def limited(problems: Iterable[CheckpointProblem]) -> list[CheckpointProblem]:
    """The first thousand problems of each kind in full; the others counted, one line a kind.

    A hostile header can name 300,000 wrong tensors; their reports would fill the memory.
    """
    out: list[CheckpointProblem] = []
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.kind] += 1
        if counts[problem.kind] <= _MAX_PER_KIND:
            out.append(problem)
    for kind, count in counts.items():
        if count > _MAX_PER_KIND:
            fix = next(p.fix for p in out if p.kind == kind)
            detail = f"and {count - _MAX_PER_KIND:,} more of this kind"
            out.append(CheckpointProblem(kind, "", "", detail, fix))
    return out
