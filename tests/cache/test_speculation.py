"""Draft tokens: rejected ones leave nothing behind. MTP windows: the token that follows counts."""

from __future__ import annotations

import pytest
import torch

from dsv4.core.errors import RequestError
from dsv4.ops import cache as kernel_writes
from dsv4.reference import cache_writes as oracle_writes
from dsv4.testing.cases import DEVICE
from support.cache_history import History
from support.cache_life import small_manager

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def feed(h: History, request, tokens: list[int], accepted: int, upcoming: int) -> None:
    """One step of `tokens`, of which the first `accepted` count; `upcoming` is sampled after."""
    own, number = request.length, request.number
    step = h.manager.prepare([(request, len(tokens))])
    h.tokens[number] = h.tokens[number][:own] + tokens
    h.upcoming[number] = upcoming
    h.after_step(step, [accepted])
    del h.tokens[number][own + accepted :]
    step.commit([accepted])
    h.manager.check()


def start(h: History, tokens: list[int], upcoming: int):
    request = h.manager.admit()
    h.tokens[request.number] = []
    feed(h, request, tokens, len(tokens), upcoming)
    return request


@pytest.mark.parametrize("writes", [oracle_writes, kernel_writes], ids=["oracle", "kernels"])
@pytest.mark.parametrize("drafts", [1, 2, 3, 7])
def test_rejected_drafts_leave_nothing(drafts: int, writes) -> None:
    """Verification at every offset of a window, every number of accepted drafts, wrong tokens."""
    on_cpu = writes is kernel_writes and DEVICE == "cpu"
    h = History(small_manager(128, device=DEVICE if writes is kernel_writes else "cpu"), 0, writes)
    first_step = 6 if on_cpu and drafts != 3 else 120
    request, n = start(h, [k % 7 for k in range(first_step)], 1), 0
    while request.length < (first_step + 11 if on_cpu else 270):
        first = h.upcoming[request.number]
        accepted = 1 + n % (drafts + 1)
        step = [first] + [(n + k) % 9 for k in range(drafts)]
        feed(h, request, step, accepted, (5 * n + 3) % 9)
        if n % 2 == 0 or request.length % 128 < drafts:
            h.compare_all()
        n += 1
    h.compare_all()
    assert h.compared > 2


def test_drafts_share_a_step_with_a_prompt_and_a_fork() -> None:
    h = History(small_manager(128), 0, oracle_writes)
    m, a = h.manager, start(h, [3] * 126, 4)
    b = m.fork(a)
    h.tokens[b.number], h.upcoming[b.number] = [3] * 126, 4
    c = m.admit()
    h.tokens[c.number] = []
    step = m.prepare([(a, 4), (c, 50), (b, 6)])
    h.tokens[a.number] += [4, 1, 1, 1]
    h.tokens[c.number] += [2] * 50
    h.tokens[b.number] += [4, 2, 2, 2, 2, 2]
    h.upcoming |= {a.number: 7, c.number: 2, b.number: 8}
    h.after_step(step, [1, 50, 5])
    del h.tokens[a.number][127:], h.tokens[b.number][131:]
    step.commit([1, 50, 5])
    m.check()
    assert (a.length, b.length, c.length) == (127, 131, 50)
    assert len(a.pages) == 1  # the page that only rejected tokens needed is free again
    assert len(b.pages) == 2
    h.compare_all()
    feed(h, a, [7, 7], 2, 1)
    h.compare_all()


@pytest.mark.parametrize("accepted", [[3], [-1], [1, 1], [], [1.0]])
def test_impossible_counts_are_refused(accepted: list) -> None:
    m = small_manager()
    r = m.admit()
    step = m.prepare([(r, 2)])
    with pytest.raises(RequestError, match="accepted: expected counts within"):
        step.commit(accepted)
    step.commit([2])
    assert r.length == 2


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("boundary", [128, 256])
def test_a_prefix_hit_equals_a_cold_prefill_in_the_mtp_window(
    page_tokens: int, boundary: int
) -> None:
    """The last row of an MTP window before the boundary was made with the token behind it."""
    h = History(small_manager(page_tokens), 0, oracle_writes)
    m, shared = h.manager, [k % 7 for k in range(boundary)]
    a = start(h, shared, 3)
    assert m.keep_prefix(a, shared, 3)
    with pytest.raises(RequestError, match="next_token: expected the token after the prefix"):
        m.keep_prefix(a, shared)
    assert m.admit([*shared, 5, 3]).length == 0  # goes on in another way: nothing of it is there
    hit = m.admit([*shared, 3, 6])
    assert hit.length == boundary
    h.tokens[hit.number], h.upcoming[hit.number] = list(shared), 3
    h.compare_all()
    for r in (a, hit):
        feed(h, r, [3, 6], 2, 1)
    h.compare_all()
    windows = m.storage.layers[-1].window
    assert torch.equal(windows[a.slot, : 16 * 256], windows[hit.slot, : 16 * 256])


def test_the_mtp_row_of_another_next_token_would_be_seen() -> None:
    h = History(small_manager(128), 0, oracle_writes)
    a = start(h, [1] * 128, 3)
    h.compare_all()
    h.upcoming[a.number] = 4
    with pytest.raises(AssertionError, match="window"):
        h.compare_all()
