"""A request as the cache knows it, and a step of several requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dsv4.cache.snapshot import Snapshot
from dsv4.cache.step import StepBuffers, StepRows
from dsv4.core.errors import RequestError


@dataclass(eq=False)
class CachedRequest:
    """One request as the cache knows it.

    number    given at admission, never used again
    length    tokens the cache holds
    slot      row of the state stores; None while preempted and after release
    pages     page numbers in order of tokens; the last one may be partly filled
    snapshot  what a preempted request left on the host
    pending   a step that was prepared and is neither committed nor aborted
    chain     tokens hashed so far for kept prefixes, and their digest
    kept      keys of the prefixes that it found or kept, shortest first
    oldest    least length that its slot can go back to
    """

    number: int
    length: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    snapshot: Snapshot | None = None
    pending: Step | None = field(default=None, repr=False)
    chain: tuple[int, bytes] = field(default=(0, b""), repr=False)
    kept: tuple[bytes, ...] = field(default=(), repr=False)
    oldest: int = 0

    @property
    def is_resident(self) -> bool:
        """Whether the request can take part in a step."""
        return self.slot is not None


@dataclass(frozen=True)
class PageDemand:
    """Pages that a step would take, and where they would come from.

    needed       new pages and copies of shared ones
    free         pages that nobody owns
    reclaimable  pages that only kept prefixes own; they are dropped when a step needs them
    least        pages needed once all kept prefixes are dropped: some copies fall away then
    """

    needed: int
    free: int
    reclaimable: int
    least: int

    @property
    def fits(self) -> bool:
        """Whether `prepare` would succeed."""
        return self.needed <= self.free or self.least <= self.free + self.reclaimable


@dataclass(eq=False)
class Step:
    """A prepared step: pages are attached, tables written. It ends in `commit` or in `abort`.

    spans  (request, number of new tokens), in the order of the rows
    """

    spans: tuple[tuple[CachedRequest, int], ...]
    _rows: StepRows = field(repr=False)
    _buffers: StepBuffers = field(repr=False)
    _serial: int = field(repr=False)
    _settle: Callable[[CachedRequest, bool], None] = field(repr=False)
    _has_ended: bool = field(default=False, init=False, repr=False)

    @property
    def rows(self) -> StepRows:
        """Metadata of the token rows. Raises RequestError once another step was prepared."""
        if self._buffers.serial != self._serial:
            raise RequestError(
                "step", "the step prepared last", f"step {self._serial} of {self._buffers.serial}",
                "run a step before the next is prepared: all use the same device buffers",
            )  # fmt: skip
        return self._rows

    @property
    def page_table(self) -> Tensor:
        """[num_slots, max_pages] int32 on the device: the same tensor in every step."""
        return self._buffers.page_table

    def commit(self, accepted: Sequence[int] | None = None) -> None:
        """Count the tokens of the step as cached, after the step ran.

        accepted  how many of each request's new tokens count, in the order of `spans`, where some
                  were drafts; None for all. Rows of others must not have been appended. Pages
                  that only they needed are given back.

        A request released meanwhile is left out, and its slot and pages are free from here on.
        Raises RequestError the second time.
        """
        counts = [n for _, n in self.spans] if accepted is None else list(accepted)
        within = len(counts) == len(self.spans) and all(
            isinstance(a, int) and not isinstance(a, bool) and 0 <= a <= n
            for a, (_, n) in zip(counts, self.spans, strict=True)
        )
        if not within:
            raise RequestError("accepted", f"counts within {[n for _, n in self.spans]}", accepted)
        self._end(counts, is_trimmed=accepted is not None)

    def abort(self) -> None:
        """Give back the pages that `prepare` added: the step did not run, or its results go.

        A copy that `prepare` made of a shared page stays with the request. Ring and state rows that
        a step did append stay written: abort before it appends, or release the request.
        """
        self._end([0] * len(self.spans), is_trimmed=True)

    def _end(self, counts: Sequence[int], is_trimmed: bool) -> None:
        if self._has_ended:
            raise RequestError("step", "one that has not ended", "a committed or aborted step")
        self._has_ended = True
        for (request, _), n in zip(self.spans, counts, strict=True):
            request.pending = None
            request.length += n
            self._settle(request, is_trimmed)
