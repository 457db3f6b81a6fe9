"""Prompts of every size class through the model before it is ready, so that nothing compiles later.

Triton compiles a kernel anew for an integer argument that is 1 or divisible by 16, and for a
pointer that is not aligned to 16 bytes, as columns of int64 are after an odd number of rows. Beyond
that, tiles and splits change at certain numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsv4.cache.request import CachedRequest, Step
from dsv4.engine.model import ProductionModel


def size_classes(most: int) -> list[int]:
    """Numbers of rows up to `most` that stand for all others.

    In every span from one power of two to the next, the least and the largest of each kind: odd,
    even, divisible by 16. So what changes once within a span is met before and after the change.
    """
    sizes, low = {1}, 1
    while low < most:
        span = range(low + 1, min(2 * low, most) + 1)
        for numbers in (span, reversed(span)):
            sizes.update({(n % 2, n % 16 == 0): n for n in numbers}.values())
        low = span[-1]
    return sorted(sizes)


@contextmanager
def prompts(
    model: ProductionModel, num_rows: int, padded: int | None = None
) -> Iterator[Step | None]:
    """A step of `num_rows` rows that is undone afterwards; None where they do not fit.

    padded  rows of the step, padding included; None for no padding
    """
    requests: list[CachedRequest] = []
    try:
        spans = _spans(model, num_rows, requests)
        if sum(n for _, n in spans) < num_rows or not model.cache.demand(spans).fits:
            yield None
            return
        step = model.prepare(spans, padded)
        try:
            yield step
        finally:
            step.abort()
    finally:
        for request in requests:
            model.cache.release(request)


def _spans(
    model: ProductionModel, num_rows: int, requests: list[CachedRequest]
) -> Sequence[tuple[CachedRequest, int]]:
    spans = []
    while num_rows and model.cache.num_free_slots:
        requests.append(model.cache.admit())
        n = min(num_rows, model.max_context)
        spans.append((requests[-1], n))
        num_rows -= n
    return spans
