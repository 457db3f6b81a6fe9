"""PageAllocator: nothing lost, nothing twice, nothing taken on failure."""

from __future__ import annotations

import pytest

from dsv4.cache.allocator import NULL_PAGE, PageAllocator
from dsv4.core.errors import CapacityError, RequestError


def test_the_null_page_is_never_handed_out() -> None:
    a = PageAllocator(5)
    assert sorted(a.take(4)) == [1, 2, 3, 4]
    with pytest.raises(CapacityError, match="cache pages: needed 1, free 0"):
        a.take(1)


def test_failure_takes_nothing() -> None:
    a = PageAllocator(4)
    mine = a.take(1)
    with pytest.raises(CapacityError) as error:
        a.take(3)
    assert (error.value.needed, error.value.free) == (3, 2)
    assert a.num_free == 2
    a.check([mine])


def test_a_page_is_free_when_its_last_owner_lets_go() -> None:
    a = PageAllocator(3)
    (page,) = a.take(1)
    a.retain([page])
    assert a.release([page]) == []
    a.check([[page]])
    assert a.release([page]) == [page]
    assert a.num_free == 2


@pytest.mark.parametrize("pages", [[NULL_PAGE], [-1], [3], [1, 1], [2]])
def test_releasing_what_is_not_owned_is_refused(pages: list[int]) -> None:
    a = PageAllocator(3)
    assert a.take(1) == [1]
    with pytest.raises(RequestError, match="pages: expected pages with at least"):
        a.release(pages)
    with pytest.raises(RequestError):
        a.retain(pages if pages != [1, 1] else [2])
    a.check([[1]])


@pytest.mark.parametrize("num_pages", [0, -1, True, 2.0])
def test_bad_sizes(num_pages: object) -> None:
    with pytest.raises(RequestError, match="num_pages: expected"):
        PageAllocator(num_pages)  # type: ignore[arg-type]


def test_check_sees_a_lost_page() -> None:
    a = PageAllocator(4)
    a.take(2)
    with pytest.raises(AssertionError, match="owners and reference counts differ"):
        a.check([[1]])
    a._free.pop()
    with pytest.raises(AssertionError, match="a page is lost"):
        a.check([[1, 2]])
