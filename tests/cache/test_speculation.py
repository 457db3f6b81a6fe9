"""Draft tokens: rejected ones leave nothing behind. MTP windows: the token that follows counts,
for kept prefixes and for forks."""

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


def fork(h: History, parent, again: bool):
    child = h.manager.fork(parent, again=again)
    own = h.tokens[parent.number]
    h.tokens[child.number] = own[: child.length]
    h.upcoming[child.number] = own[-1] if again else h.upcoming[parent.number]
    return child


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 127, 128, 129, 256, 257, 300])
def test_a_fork_that_goes_on_otherwise_computes_its_last_token_again(
    length: int, page_tokens: int
) -> None:
    """Every store is then that of a request which never was a fork, MTP windows included."""
    h = History(small_manager(page_tokens), 0, oracle_writes)
    m, shared = h.manager, [k * k % 7 for k in range(length)]
    a = start(h, shared, 3)
    b = fork(h, a, again=True)
    assert (b.length, len(b.pages)) == (length - 1, m.schema.pages_for(length - 1))
    h.compare_all()
    feed(h, b, shared[-1:], 1, 5)  # 5 is sampled where the parent went on with 3
    h.compare_all()
    mtp = m.storage.layers[-1].window
    assert not torch.equal(mtp[a.slot], mtp[b.slot])
    for child, first in ((fork(h, b, again=True), 8), (fork(h, b, again=False), 5)):
        tokens = [h.upcoming[child.number], first]
        feed(h, child, tokens, 2, 1)
        h.compare_all()
        m.release(child)
    for r, token in ((a, 3), (b, 5)):
        feed(h, r, [token, 6], 2, 1)
    h.compare_all()


def test_a_plain_fork_has_the_next_token_of_its_parent() -> None:
    h = History(small_manager(128), 0, oracle_writes)
    a = start(h, [1] * 20, 3)
    b = fork(h, a, again=False)
    h.compare_all()
    h.upcoming[b.number] = 4
    with pytest.raises(AssertionError, match="window"):
        h.compare_all()


def test_a_slot_goes_back_one_token_and_not_behind_what_it_began_with() -> None:
    h = History(small_manager(128), 0, oracle_writes)
    m, shared = h.manager, [k % 7 for k in range(128)]
    fresh = m.admit()
    a = start(h, shared, 3)
    m.keep_prefix(a, shared, 3)
    hit = m.admit([*shared, 3])  # its HCA rows stayed behind
    h.tokens[hit.number], h.upcoming[hit.number] = list(shared), 3
    child = m.fork(a, again=True)
    free = m.num_free_slots, m.allocator.num_free
    for r, oldest in ((fresh, 0), (hit, 128), (child, 127)):
        with pytest.raises(RequestError, match=f"again: expected .* than the {oldest} tokens"):
            m.fork(r, again=True)
    assert free == (m.num_free_slots, m.allocator.num_free)
    m.release(fresh)
    m.release(child)
    feed(h, hit, [3], 1, 2)
    b = fork(h, hit, again=True)
    feed(h, b, [3], 1, 6)
    h.compare_all()
    m.check()


def test_a_fork_that_computes_a_boundary_again_is_hashed_anew() -> None:
    m = small_manager(128)
    a = m.admit()
    m.prepare([(a, 128)]).commit()
    assert m.keep_prefix(a, [1] * 128, 3)
    b, c = m.fork(a, again=True), m.fork(a)
    m.prepare([(b, 1)]).commit()
    own = [1] * 127 + [9]  # whatever it was given: prefixes are found by content
    assert m.keep_prefix(b, own, 3)
    assert not m.keep_prefix(c, [None] * 128, 3)  # type: ignore[list-item]
    m.release(c)
    assert m.admit([*own, 3]).length == 128
    m.check()
