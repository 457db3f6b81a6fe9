"""The tensors of a step: their contents, and that they are the same ones step after step."""

from __future__ import annotations

import pytest
import torch

from dsv4.cache import step
from dsv4.cache.step import STAGES, StepBuffers
from dsv4.core.errors import CapacityError, RequestError
from support.cache_life import Life, small_manager

COLUMNS = ("slot", "position", "end_position", "first_row", "first_position")


def pointers(rows) -> list[int]:
    return [getattr(rows, name).data_ptr() for name in COLUMNS]


def test_contents_and_padding() -> None:
    rows = StepBuffers(4, 2, 7, "cpu").fill([(3, 10, 2), (1, 0, 3), (2, 5, 0)], num_rows=7)
    assert rows.slot.tolist() == [3, 3, 1, 1, 1, -1, -1]
    assert rows.position.tolist() == [10, 11, 0, 1, 2, 0, 0]
    assert rows.end_position.tolist() == [12, 12, 3, 3, 3, 0, 0]
    assert rows.first_row.tolist() == [0, 0, 2, 2, 2, 0, 0]
    assert rows.first_position.tolist() == [10, 10, 0, 0, 0, 0, 0]
    for name in COLUMNS:
        column = getattr(rows, name)
        assert column.dtype == torch.int64
        assert column.is_contiguous()


@pytest.mark.parametrize(("num_rows", "spans"), [(4, [(0, 0, 5)]), (9, []), (None, [(0, 0, 9)])])
def test_rows_that_do_not_fit_are_refused(num_rows: int | None, spans) -> None:
    buffers = StepBuffers(1, 1, 8, "cpu")
    with pytest.raises(ValueError, match="num_rows: expected"):
        buffers.fill(spans, num_rows)
    assert buffers.serial == 0


def test_nothing_and_padding_alone() -> None:
    buffers = StepBuffers(1, 1, 8, "cpu")
    assert len(buffers.fill([]).slot) == 0
    assert buffers.fill([], 3).slot.tolist() == [-1] * 3


class FakeEvent:
    """A copy that is under way until somebody waits for it; a log of what was asked of it."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.is_done = log, name, True

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.log.append(f"waited for {self.name}")
        self.is_done = True

    def record(self, stream: object) -> None:
        self.log.append(f"started {self.name}")
        self.is_done = False


def test_host_memory_changes_only_when_its_copy_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each stage is copied asynchronously; its event is what guards it."""
    buffers, log = StepBuffers(2, 1, 8, "cpu"), []
    assert STAGES == len(buffers._stages) == 2
    for name, stage in zip("ab", buffers._stages, strict=True):
        stage._copied = FakeEvent(log, name)  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    write = step._write_columns
    monkeypatch.setattr(step, "_write_columns", lambda *args: (log.append("wrote"), write(*args)))
    for position in range(4):
        buffers.fill([(0, position, 1)])
    assert log == [
        "wrote", "started a", "wrote", "started b", "waited for a", "wrote", "started a",
        "waited for b", "wrote", "started b",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="invalid literal"):
        buffers.fill([(0, "x", 1)])  # type: ignore[list-item]
    assert log[-3:] == [
        "waited for a",
        "wrote",
        "started a",
    ]  # what was begun is waited for all the same


def test_the_page_table_follows_at_the_next_step() -> None:
    buffers = StepBuffers(5, 3, 8, "cpu")
    for slot, pages in ((1, [7, 8, 9]), (2, [4]), (4, [5, 6])):
        buffers.set_pages(slot, pages)
    assert not buffers.page_table.any()
    assert buffers.changed_slots == {1, 2, 4}
    buffers.fill([])
    want = [[0, 0, 0], [7, 8, 9], [4, 0, 0], [0, 0, 0], [5, 6, 0]]
    assert buffers.page_table.tolist() == want
    buffers.set_pages(1, [3])  # fewer pages leave no old ones
    buffers.fill([])
    assert buffers.page_table[1].tolist() == [3, 0, 0]
    assert not buffers.changed_slots


def test_a_captured_graph_finds_every_step_in_the_same_place() -> None:
    m = small_manager(page_tokens=128, num_pages=40)
    life, seen, sizes = Life(m, 5), {}, set()
    for k in range(120):
        life.one()
        for r in m.requests:  # one step of a token each, padded to 4 or 8 rows
            if r.pending is not None:
                r.pending.abort()
        batch = [(r, 1) for r in m.requests if r.is_resident and r.length < m.max_context][:4]
        try:
            step = m.prepare(batch, (4, 8)[k % 2])
        except CapacityError:
            continue
        rows = step.rows
        now = (*pointers(rows), step.page_table.data_ptr())
        assert seen.setdefault(len(rows.slot), now) == now
        assert rows.slot.tolist()[: len(batch)] == [r.slot for r, _ in batch]
        assert (rows.slot[len(batch) :] == -1).all()
        assert m.page_table.tolist() == m.buffers.table.tolist()
        sizes.add(len(batch))
        step.abort()
    assert len(seen) == 2
    assert len(sizes) > 2


def test_handles_cost_no_allocation() -> None:
    """Rows, page table and the views of a layer are tensors that exist already."""
    m = small_manager()
    r = m.admit()
    first = m.prepare([(r, 1)], 4)
    rows, table = first.rows, first.page_table
    first.commit()
    second = m.prepare([(r, 1)], 4)
    assert second.rows is rows
    assert second.page_table is table
    assert m.storage.layers[1] is m.storage.layers[1]
    assert m.storage.layers[1].entries is m.storage.layers[1].entries


def test_only_the_last_prepared_step_can_run() -> None:
    m = small_manager()
    a, b = m.admit(), m.admit()
    first = m.prepare([(a, 2)])
    assert first.rows.position.tolist() == [0, 1]
    second = m.prepare([(b, 3)])
    with pytest.raises(RequestError, match="step: expected the step prepared last"):
        _ = first.rows
    assert second.rows.position.tolist() == [0, 1, 2]
    first.abort()  # the pages come back all the same
    second.commit()
    m.check()


def test_a_step_has_at_most_max_rows() -> None:
    m = small_manager()
    m.buffers.max_rows = 16
    r = m.admit()
    for n, num_rows in ((17, None), (1, 17)):
        with pytest.raises(RequestError, match="num_rows: expected .* at most max_rows 16"):
            m.prepare([(r, n)], num_rows)
    assert not r.pages
    m.prepare([(r, 16)]).commit()
    m.check()
