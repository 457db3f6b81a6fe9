"""Problem lists of bounded length."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from dsv4.core.errors import CheckpointProblem

_MAX_PROBLEMS = 1000


def limited(problems: Iterable[CheckpointProblem]) -> list[CheckpointProblem]:
    """The first thousand problems, and a last one that says so where there are more.

    A hostile header can name 300,000 wrong tensors; their reports would cost seconds.
    """
    rest = iter(problems)
    out = list(islice(rest, _MAX_PROBLEMS))
    more = next(rest, None)
    if more is not None:
        detail = f"and more: the list stops after {_MAX_PROBLEMS:,}"
        out.append(CheckpointProblem(more.kind, "", "", detail, more.fix))
    return out
