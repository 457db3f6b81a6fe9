"""Pages as numbers: a free list with reference counts. Host code, no torch.

Pages are taken and released between steps, never inside a captured graph. A page may have several
owners (forks, prefix snapshots); it returns to the free list when the last one lets go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4.core.errors import CapacityError, RequestError

NULL_PAGE = 0  # never handed out: what padding of page tables points at


class PageAllocator:
    """Hands out pages 1 .. num_pages - 1.

    num_pages  pages of the device allocation, the null page included

    Nothing is taken when a call fails. Raises RequestError for misuse, CapacityError when pages
    run out.
    """

    def __init__(self, num_pages: int) -> None:
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or num_pages < 1:
            raise RequestError("num_pages", "at least 1 (the null page)", num_pages)
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # the lowest number goes first
        self._owners = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many owners `page` has."""
        return self._owners[page]

    def take(self, n: int) -> list[int]:
        """Take `n` pages with one owner each. Raises CapacityError, taking none, if too few are."""
        if n < 0:
            raise RequestError("n", "at least 0", n)
        if n > len(self._free):
            raise CapacityError("cache pages", n, len(self._free), "release or preempt a request")
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def retain(self, pages: Sequence[int]) -> None:
        """Add an owner to each of `pages`, all of which must be owned already."""
        self._check_owned(pages)
        for page in pages:
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> list[int]:
        """Take an owner from each of `pages`; return those that became free."""
        self._check_owned(pages)
        freed = []
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
                freed.append(page)
        return freed

    def check(self, owned: Iterable[Sequence[int]]) -> None:
        """Assert that the owners' lists of pages account for every page exactly.

        owned  one list of pages for each owner. Free and owned pages add up to all of them, and no
               page has more or fewer owners than lists that name it.
        """
        counts = [0] * self.num_pages
        for pages in owned:
            for page in pages:
                counts[page] += 1
        assert counts == self._owners, "owners and reference counts differ"
        assert len(set(self._free)) == len(self._free), "a page is twice in the free list"
        assert all(self._owners[p] == 0 for p in self._free), "an owned page is in the free list"
        in_use = sum(n > 0 for n in self._owners)
        assert in_use + len(self._free) == self.num_pages - 1, "a page is lost"

    def _check_owned(self, pages: Sequence[int]) -> None:
        needed: dict[int, int] = {}
        for page in pages:
            needed[page] = needed.get(page, 0) + 1
        for page, n in needed.items():
            known = isinstance(page, int) and NULL_PAGE < page < self.num_pages
            if not known or self._owners[page] < n:
                raise RequestError("pages", f"pages with at least {n} owners", page)
