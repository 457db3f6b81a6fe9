"""What one forward step does to the cache: which rows go where.

The tensors stay where they are for the life of a cache, so that a captured graph can read them;
only their contents change from step to step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsv4.cache.allocator import NULL_PAGE

PADDING = -1  # slot of a row that must not touch the cache
DEFAULT_MAX_ROWS = 8192
COLUMNS = 5  # of StepRows
STAGES = 2  # steps the host may prepare before the device has taken the first


@dataclass(frozen=True)
class StepRows:
    """Metadata of the T token rows of a step, int64 on the device. Padding rows have slot -1.

    slot            [T] where the row's request keeps its state
    position        [T] of the token in its request
    end_position    [T] length of the request after the step; a step that verifies draft tokens
                    lowers it on the device before it appends, and rows from there on stay out
    first_row       [T] row of the request's first token in this step
    first_position  [T] position of that token
    """

    slot: Tensor
    position: Tensor
    end_position: Tensor
    first_row: Tensor
    first_position: Tensor


class StepBuffers:
    """The rows of a step and the page table on the device, and what fills them.

    page_table  [num_slots, max_pages] int32 on the device, as of the last `fill`
    table       the same on the host, as of now
    max_rows    most rows of a step, padding included
    serial      how many steps were filled in, or begun

    `fill` writes pinned memory and starts asynchronous copies on the current stream: it allocates
    no device memory, and waits only for copies of STAGES steps ago. Everything that reads the
    tensors belongs on that stream.
    """

    def __init__(
        self, num_slots: int, max_pages: int, max_rows: int, device: torch.device | str
    ) -> None:
        device = torch.device(device)
        shape = (num_slots, max_pages)
        self.max_rows, self.serial = max_rows, 0
        self.page_table = torch.full(shape, NULL_PAGE, dtype=torch.int32, device=device)
        self.table = np.full(shape, NULL_PAGE, dtype=np.int32)
        self._rows = torch.zeros(COLUMNS * max_rows, dtype=torch.int64, device=device)
        self._stages = [_Stage(shape, max_rows, device) for _ in range(STAGES)]
        self._views: dict[int, StepRows] = {}
        self._changed: set[int] = set()

    @property
    def changed_slots(self) -> frozenset[int]:
        """Slots whose row of the device's page table is not that of `table` yet."""
        return frozenset(self._changed)

    def set_pages(self, slot: int, pages: Sequence[int]) -> None:
        """Make `pages` the pages of a slot from the next step on."""
        row = self.table[slot]
        row[: len(pages)] = pages
        row[len(pages) :] = NULL_PAGE
        self._changed.add(slot)

    def fill(self, spans: Sequence[tuple[int, int, int]], num_rows: int | None = None) -> StepRows:
        """Rows of requests one after the other, and the page tables that changed.

        spans     (slot, position of the first new token, number of new tokens) of each request
        num_rows  pad to this many rows; None for no padding

        The same `num_rows` gives the same tensors, whose contents the next `fill` replaces.
        """
        num_tokens = sum(n for _, _, n in spans)
        T = num_tokens if num_rows is None else num_rows
        if not num_tokens <= T <= self.max_rows:
            raise ValueError(f"num_rows: expected {num_tokens} to {self.max_rows}, got {T}")
        stage = self._stages[self.serial % STAGES]
        stage.wait()
        self.serial += 1  # even if a copy fails: the rows of the step before are no longer whole
        try:
            _write_columns(stage.numbers[: COLUMNS * T].reshape(COLUMNS, T), spans, num_tokens)
            self._rows[: COLUMNS * T].copy_(stage.rows[: COLUMNS * T], non_blocking=True)
            for first, end in _runs(self._changed):
                stage.pages[first:end] = self.table[first:end]
                self.page_table[first:end].copy_(stage.table[first:end], non_blocking=True)
        finally:
            stage.started()
        self._changed.clear()
        return self._rows_of(T, is_kept=num_rows is not None)

    def _rows_of(self, T: int, is_kept: bool) -> StepRows:
        if T in self._views:
            return self._views[T]
        rows = StepRows(*self._rows[: COLUMNS * T].view(COLUMNS, T).unbind())
        if is_kept:
            self._views[T] = rows
        return rows


class _Stage:
    """Host memory that one step is copied from; it may change again when the copies are done."""

    def __init__(self, shape: tuple[int, int], max_rows: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self.rows = torch.zeros(COLUMNS * max_rows, dtype=torch.int64, pin_memory=on_gpu)
        self.table = torch.zeros(shape, dtype=torch.int32, pin_memory=on_gpu)
        self.numbers, self.pages = self.rows.numpy(), self.table.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()

    def started(self) -> None:
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


def _write_columns(
    columns: np.ndarray, spans: Sequence[tuple[int, int, int]], num_tokens: int
) -> None:
    """Fill [5, T] in the order of StepRows."""
    n = num_tokens
    slots, starts, counts = np.array(spans, dtype=np.int64).reshape(-1, 3).T
    slot, position, end, row, first = columns
    slot[:n] = np.repeat(slots, counts)
    end[:n] = np.repeat(starts + counts, counts)
    row[:n] = np.repeat(np.cumsum(counts) - counts, counts)
    first[:n] = np.repeat(starts, counts)
    position[:n] = np.arange(n) - row[:n] + first[:n]
    slot[n:] = PADDING
    columns[1:, n:] = 0


def _runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers as (first, end)."""
    first = end = -1
    for number in sorted(numbers):
        if number != end:
            if end > 0:
                yield first, end
            first = number
        end = number + 1
    if end > 0:
        yield first, end
