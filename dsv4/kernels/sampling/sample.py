"""Sampling without a sort: two launches, or four where a request may have filters. Triton, SM 9 on.

A row is cut into tiles, and what is added up does not depend on which program adds it:

    tiles   best logit of each tile, sum of its shares
    levels  count and mass of each tile above 15 thresholds and above min_p
    list    ids between the two thresholds where the cut of top-k and top-p must lie
    sample  the exact cut, by thresholds between thresholds; the mass of every tile under it; the
            tile where the random number falls, and the token in it

A row that needs less leaves the later steps at once. Masses are FP32 in a tile and FP64 across.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.checks import check_float
from dsv4.kernels.common.cut import find_cut, key_range, list_logits, load_places, tie_id
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.sampling import (
    KEY_MAX,
    KEY_MIN,
    MINUS_INF_KEY,
    NO_ID,
    from_key,
    load_logits,
    load_rate,
    pick,
    share,
    to_key,
    uniform,
)

REFERENCE = "dsv4.reference.sampling:sample"
CONFIG = {"TILE": 2048, "num_warps": 4}
LEVELS = 16  # thresholds a row, min_p's and that of everything among them
LEVEL_SPAN = 256  # logits held against the thresholds at a time
SPLIT, SPAN = 32, 512  # thresholds of a round of the search; places of the list at a time
MAX_ROWS = 65535  # second dimension of a grid
PROGRAMS = 2048  # of a launch over tiles, about, once there are that many tiles
LAST = tl.constexpr(15)  # the level under everything
MIDDLE = tl.constexpr(5)  # the level of the least of the tiles' best


@triton.jit
def load_filters(top_k_ptr, top_p_ptr, min_p_ptr, b, V):
    """Filters of a row, those that do nothing as k = 0, p = 2, q = 0."""
    k = (b * 0).to(tl.int32)
    p, q = k.to(tl.float32) + 2.0, k.to(tl.float32)
    if top_k_ptr is not None:
        k = tl.load(top_k_ptr + b)
        k = tl.where((k > 0) & (k < V), k, 0)
    if top_p_ptr is not None:
        p = tl.load(top_p_ptr + b)
        p = tl.where(p < 1, p, 2.0)
    if min_p_ptr is not None:
        q = tl.load(min_p_ptr + b)
        q = tl.where(q < 1, q, 1.0)
    return k, p, q


@triton.jit
def row_levels(keys_ptr, b, NT, TILES: tl.constexpr, LEVELS: tl.constexpr):
    """Best logit of a row, and its thresholds as keys, falling: [LEVELS] with the last for all.

    The first lie between the best and the least of the tiles' best, where a tile has few logits:
    the cut is there unless it keeps more than that. The others go down to the least logit.
    """
    c, j = tl.arange(0, TILES), tl.arange(0, LEVELS)
    row_ptr = keys_ptr + b * 3 * NT
    tops = tl.load(row_ptr + c, c < NT, KEY_MIN)
    lows = tl.load(row_ptr + 2 * NT + c, c < NT, KEY_MAX)
    best = from_key(tl.max(tops, axis=0))
    middle = from_key(tl.min(tl.where(tops > MINUS_INF_KEY, tops, KEY_MAX), axis=0))
    low = from_key(tl.min(lows, axis=0))
    high64, middle64, low64 = best.to(tl.float64), middle.to(tl.float64), low.to(tl.float64)
    upper = high64 - (high64 - middle64) * (j.to(tl.float64) / MIDDLE)
    lower = middle64 - (middle64 - low64) * ((j - MIDDLE).to(tl.float64) / (LAST - 1 - MIDDLE))
    level = tl.where(j < MIDDLE, upper, lower).to(tl.float32)
    level = tl.where(level == level, level, best)  # best is infinite
    level = tl.where(level == 0, 0.0, level)
    return best, tl.where(j < LAST, to_key(level), MINUS_INF_KEY)


@triton.jit
def find_bins(count, mass, k, p, LEVELS: tl.constexpr):
    """First and last level whose bins can hold the cut; (1, 0) if the row has neither filter.

    count, mass  [LEVELS] of all that is at or above each level; level 0 is min_p's
    """
    j = tl.arange(0, LEVELS)
    k_bin = tl.min(tl.where((j > 0) & (count >= k), j, LAST), axis=0)
    whole = pick(mass, j, LAST)
    least = tl.where(k > 0, tl.where(k_bin > 1, pick(mass, j, k_bin - 1), 0.0), whole)
    most = tl.where(k > 0, pick(mass, j, k_bin), whole)
    first_p = tl.min(tl.where((j > 0) & (mass >= p * least), j, LAST), axis=0)
    last_p = tl.min(tl.where((j > 0) & (mass >= p * most), j, LAST), axis=0)
    first = tl.where(p < 1, tl.minimum(first_p, tl.where(k > 0, k_bin, LAST)), k_bin)
    last = tl.where(k > 0, k_bin, last_p)
    is_cut = (k > 0) | (p < 1)
    return tl.where(is_cut, first, 1), tl.where(is_cut, last, 0)


@triton.jit
def sample_tiles_kernel(
    logits_ptr, temperature_ptr, keys_ptr, sums_ptr, V, NT,
    TILE: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    c, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = c * TILE + tl.arange(0, TILE)
    x = load_logits(logits_ptr + b * V, at, at < V)
    key = to_key(x)
    best = tl.max(key, axis=0)
    row_ptr = keys_ptr + b * 3 * NT + c
    tl.store(row_ptr, best)
    tl.store(row_ptr + NT, tl.min(tl.where(key == best, at, NO_ID), axis=0))
    if FILTERS:
        least = tl.min(tl.where(key > MINUS_INF_KEY, key, KEY_MAX), axis=0)
        tl.store(row_ptr + 2 * NT, least)
    rate = load_rate(temperature_ptr, b)
    if rate > 0:
        total = tl.sum(share(x, from_key(best), rate), axis=0)
        tl.store(sums_ptr + b * NT + c, total.to(tl.float64))


@triton.jit
def sample_levels_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, keys_ptr, counts_ptr,
    masses_ptr, V, NT, group,
    TILE: tl.constexpr, TILES: tl.constexpr, LEVELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, p, q = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, b, V)
    rate = load_rate(temperature_ptr, b)
    if (rate > 0) & ((k > 0) | (p < 1) | (q > 0)):
        best, level = row_levels(keys_ptr, b, NT, TILES, LEVELS)
        j = tl.arange(0, LEVELS)
        for c in range(g * group, tl.minimum(NT, (g + 1) * group)):
            count = tl.zeros([LEVELS, SPAN], tl.int32)
            mass = tl.zeros([LEVELS, SPAN], tl.float32)
            for start in tl.static_range(0, TILE, SPAN):
                at = c * TILE + start + tl.arange(0, SPAN)
                x = load_logits(logits_ptr + b * V, at, at < V)
                w, key = share(x, best, rate), tl.where(at < V, to_key(x), KEY_MIN)
                # Level 0 asks for a share of at least q, the others for a key.
                by_key = (key[None, :] >= level[:, None]) & (j > 0)[:, None]
                is_above = by_key | ((w >= q)[None, :] & (j == 0)[:, None])
                count += is_above.to(tl.int32)
                mass += tl.where(is_above, w[None, :], 0.0)
            to = (b * NT + c) * LEVELS + j
            tl.store(counts_ptr + to, tl.sum(count, axis=1))
            tl.store(masses_ptr + to, tl.sum(mass, axis=1))


@triton.jit
def column(table_ptr, b, NT, j, has, TILES: tl.constexpr, LEVELS: tl.constexpr):
    """Level j of every tile, [TILES]; zeros unless `has`."""
    c = tl.arange(0, TILES)
    return tl.load(table_ptr + (b * NT + c) * LEVELS + j, c < tl.where(has, NT, 0), 0)


@triton.jit
def sample_list_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, keys_ptr, counts_ptr,
    masses_ptr, row_counts_ptr, row_masses_ptr, list_ptr, V, NT, group,
    TILE: tl.constexpr, TILES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, p, q = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, b, V)
    if (load_rate(temperature_ptr, b) > 0) & ((k > 0) | (p < 1) | (q > 0)):
        j, c = tl.arange(0, LEVELS), tl.arange(0, TILES)
        cell = (b * NT + c[:, None]) * LEVELS + j[None, :]
        is_tile = (c < NT)[:, None] & (j >= 0)[None, :]
        count = tl.sum(tl.load(counts_ptr + cell, is_tile, 0), axis=0)
        mass = tl.sum(tl.load(masses_ptr + cell, is_tile, 0.0).to(tl.float64), axis=0)
        if g == 0:
            tl.store(row_counts_ptr + b * LEVELS + j, count)
            tl.store(row_masses_ptr + b * LEVELS + j, mass)
        first, last = find_bins(count, mass, k, p, LEVELS)
        num = column(counts_ptr, b, NT, last, first <= last, TILES, LEVELS)
        num -= column(counts_ptr, b, NT, first - 1, (first > 1) & (first <= last), TILES, LEVELS)
        _, level = row_levels(keys_ptr, b, NT, TILES, LEVELS)
        high = tl.where(first > 1, pick(level, j, first - 1), KEY_MAX)
        low = pick(level, j, last)
        place = tl.cumsum(num, axis=0) - num
        for tile in range(g * group, tl.minimum(NT, (g + 1) * group)):
            if pick(num, c, tile) > 0:
                at = tile * TILE + tl.arange(0, TILE)
                key = to_key(load_logits(logits_ptr + b * V, at, at < V))
                is_here = ((key >= low) & (key < high) & (at < V)).to(tl.int32)
                to = pick(place, c, tile) + tl.cumsum(is_here, axis=0) - is_here
                tl.store(list_ptr + b * V + to, at, is_here > 0)


@triton.jit
def tile_masses(
    row_ptr, list_ptr, counts_ptr, masses_ptr, b, NT, first, last, best, rate, cut, last_id,
    TILES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Mass of every tile under the cut: what is above the list, and the kept part of the list."""
    i, has_above, has_list = tl.arange(0, 16), first > 1, first <= last
    mass = column(masses_ptr, b, NT, first - 1, has_above, TILES, LEVELS).to(tl.float64)
    num = column(counts_ptr, b, NT, last, has_list, TILES, LEVELS)
    num -= column(counts_ptr, b, NT, first - 1, has_above & has_list, TILES, LEVELS)
    start = tl.cumsum(num, axis=0) - num
    for done in range(0, tl.max(num, axis=0), 16):
        is_place = done + i[None, :] < num[:, None]
        ids, x = list_logits(row_ptr, list_ptr, start[:, None] + done + i[None, :], is_place)
        key = to_key(x)
        is_kept = is_place & ((key > cut) | ((key == cut) & (ids <= last_id)))
        kept = tl.where(is_kept, share(x, best, rate), 0.0)
        mass += tl.sum(kept.to(tl.float64), axis=1)
    return mass


@triton.jit
def list_cut(
    row_ptr, list_ptr, n, above, above_mass, whole, V, best, rate, k, p,
    SPLIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The cut of top-k, then top-p: last key and last id that are kept, and how many are."""
    cut, ties, kept = n * 0 + KEY_MIN, n * 0, n * 0 + V
    _ids, key, w = load_places(row_ptr, list_ptr, 0, n, best, rate, SPAN)
    low, high = n * 0 + MINUS_INF_KEY, n * 0 + KEY_MAX
    low, high = key_range(row_ptr, list_ptr, n, key, low, high, best, rate, SPAN)
    if k > 0:
        cut, ties, kept, whole = find_cut(
            row_ptr, list_ptr, n, key, w, low, high, above, above_mass, best, rate, k, whole,
            False, SPLIT, SPAN,
        )  # fmt: skip
        kept += ties
    if p < 1:
        p_cut, p_ties, p_kept, _mass = find_cut(
            row_ptr, list_ptr, n, key, w, low, high, above, above_mass, best, rate, k, p * whole,
            True, SPLIT, SPAN,
        )  # fmt: skip
        p_kept += p_ties
        cut, ties = tl.where(p_kept < kept, p_cut, cut), tl.where(p_kept < kept, p_ties, ties)
        kept = tl.minimum(kept, p_kept)
    return cut, tie_id(row_ptr, list_ptr, n, cut, ties, best, rate, SPAN), kept


@triton.jit
def filtered(
    row_ptr, list_ptr, counts_ptr, masses_ptr, row_counts_ptr, row_masses_ptr, b, V, NT, best,
    rate, k, p,
    TILES: tl.constexpr, LEVELS: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The cut of all filters: last key and last id that are kept, and the mass of each tile."""
    j, c = tl.arange(0, LEVELS), tl.arange(0, TILES)
    count = tl.load(row_counts_ptr + b * LEVELS + j)
    mass = tl.load(row_masses_ptr + b * LEVELS + j)
    first, last = find_bins(count, mass, k, p, LEVELS)
    above = tl.where(first > 1, pick(count, j, first - 1), 0)
    above_mass = tl.where(first > 1, pick(mass, j, first - 1), 0.0)
    n = tl.where(first <= last, pick(count, j, last) - above, 0)
    cut, last_id, kept = list_cut(
        row_ptr, list_ptr, n, above, above_mass, pick(mass, j, LAST), V, best, rate, k, p,
        SPLIT, SPAN,
    )  # fmt: skip
    tiles = tl.load(masses_ptr + (b * NT + c) * LEVELS, c < NT, 0.0).to(tl.float64)
    if pick(count, j, 0) > kept:  # min_p keeps more than the others
        tiles = tile_masses(
            row_ptr, list_ptr, counts_ptr, masses_ptr, b, NT, first, last, best, rate, cut,
            last_id, TILES, LEVELS,
        )  # fmt: skip
    return cut, last_id, tiles


@triton.jit
def draw(
    row_ptr, tiles, u, best, rate, cut, last_id, q, V, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The id where the sum of the kept shares, in the order of ids, first exceeds u times all."""
    c = tl.arange(0, TILES)
    sums = tl.cumsum(tiles, axis=0)
    target = u * pick(sums, c, TILES - 1)
    tile = tl.sum((sums <= target).to(tl.int32), axis=0)
    tile = tl.minimum(tile, tl.max(tl.where(tiles > 0, c, 0), axis=0))
    rest = tl.maximum(target - tl.where(tile > 0, pick(sums, c, tile - 1), 0.0), 0.0)
    at = tile * TILE + tl.arange(0, TILE)
    x = load_logits(row_ptr, at, at < V)
    key, w = to_key(x), share(x, best, rate)
    w = tl.where(((key > cut) | ((key == cut) & (at <= last_id))) & (w >= q), w, 0.0)
    passed = (w > 0) & (tl.cumsum(w.to(tl.float64), axis=0) > rest)
    first = tl.min(tl.where(passed, at, NO_ID), axis=0)
    # Rounding may leave the sum of the tile short of what the tile was chosen for.
    return tl.minimum(first, tl.max(tl.where(w > 0, at, -1), axis=0))


@triton.jit
def sample_kernel(
    logits_ptr, temperature_ptr, seed_ptr, position_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    keys_ptr, sums_ptr, counts_ptr, masses_ptr, row_counts_ptr, row_masses_ptr, list_ptr, ids_ptr,
    V, NT, TILE: tl.constexpr, TILES: tl.constexpr, LEVELS: tl.constexpr, SPLIT: tl.constexpr,
    SPAN: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    b, c = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    tops = tl.load(keys_ptr + b * 3 * NT + c, c < NT, KEY_MIN)
    best_key = tl.max(tops, axis=0)
    tile = tl.min(tl.where(tops == best_key, c, NT), axis=0)
    choice = tl.load(keys_ptr + (b * 3 + 1) * NT + tile)
    choice = tl.where(best_key > MINUS_INF_KEY, choice, 0)
    rate = load_rate(temperature_ptr, b)
    if (rate > 0) & (best_key > MINUS_INF_KEY):
        row_ptr, best = logits_ptr + b * V, from_key(best_key)
        cut, last_id, q = choice * 0 + KEY_MIN, choice * 0 + NO_ID, rate.to(tl.float32) * 0
        own = from_key(tops)
        gap = tl.where(own == best, 0.0, own.to(tl.float64) - best.to(tl.float64)) * rate
        # What has next to no mass counts as none, as it does in `share`.
        scale = tl.where(gap > -100.0, tl.exp2(tl.maximum(gap, -100.0)), 0.0)
        tiles = tl.load(sums_ptr + b * NT + c, c < NT, 0.0) * scale
        if FILTERS:
            k, p, q = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, b, V)
            if (k > 0) | (p < 1) | (q > 0):
                cut, last_id, tiles = filtered(
                    row_ptr, list_ptr + b * V, counts_ptr, masses_ptr, row_counts_ptr,
                    row_masses_ptr, b, V, NT, best, rate, k, p, TILES, LEVELS, SPLIT, SPAN,
                )  # fmt: skip
        u = uniform(tl.load(seed_ptr + b), tl.load(position_ptr + b))
        drawn = draw(row_ptr, tiles, u, best, rate, cut, last_id, q, V, TILE, TILES)
        choice = tl.where(drawn >= 0, drawn, choice)
    tl.store(ids_ptr + b, choice.to(tl.int64))


def outputs(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate ids [B] int64 and room for what the launches hand on."""
    B, V = logits.shape
    NT = triton.cdiv(V, CONFIG["TILE"])
    rows = 0 if top_k is top_p is min_p is None else B
    return (
        logits.new_empty(B, dtype=torch.int64),
        logits.new_empty((B, 3, NT), dtype=torch.int32),
        logits.new_empty((B, NT), dtype=torch.float64),
        logits.new_empty((rows, NT, LEVELS), dtype=torch.int32),
        logits.new_empty((rows, NT, LEVELS), dtype=torch.float32),
        logits.new_empty((rows, LEVELS), dtype=torch.int32),
        logits.new_empty((rows, LEVELS), dtype=torch.float64),
        logits.new_empty((rows, V), dtype=torch.int32),
    )


def launch(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    ids, keys, sums, counts, masses, row_counts, row_masses, lists = out
    V, has_filters = _check(logits, temperature, seed, position, top_k, top_p, min_p, ids)
    B, TILE = logits.shape[0], CONFIG["TILE"]
    if B == 0:
        return
    NT, warps = triton.cdiv(V, TILE), CONFIG["num_warps"]
    TILES = triton.next_power_of_2(NT)
    sample_tiles_kernel[(NT, B)](
        logits, temperature, keys, sums, V, NT, TILE=TILE, FILTERS=has_filters, num_warps=warps,
        **PDL,
    )  # fmt: skip
    filters = top_k, top_p, min_p
    if has_filters:
        group = triton.cdiv(NT, max(1, PROGRAMS // B))
        grid = triton.cdiv(NT, group), B
        sizes = {"TILE": TILE, "TILES": TILES, "LEVELS": LEVELS, "num_warps": warps, **PDL}
        sample_levels_kernel[grid](
            logits, temperature, *filters, keys, counts, masses, V, NT, group,
            SPAN=LEVEL_SPAN, **sizes,
        )  # fmt: skip
        sample_list_kernel[grid](
            logits, temperature, *filters, keys, counts, masses, row_counts, row_masses, lists,
            V, NT, group, **sizes,
        )  # fmt: skip
    sample_kernel[(B,)](
        logits, temperature, seed, position, *filters, keys, sums, counts, masses, row_counts,
        row_masses, lists, ids, V, NT, TILE=TILE, TILES=TILES, LEVELS=LEVELS, SPLIT=SPLIT,
        SPAN=SPAN, FILTERS=has_filters, num_warps=8 if has_filters else warps, **PDL,
    )  # fmt: skip


def _check(
    logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None, ids: Tensor,
) -> tuple[int, bool]:  # fmt: skip
    """Check the arguments; -> V, and whether any row may have a filter."""
    specs = {
        "logits": (logits, "B V", check_float("logits", logits)),
        "temperature": (temperature, "B", torch.float32),
        "seed": (seed, "B", torch.int64),
        "position": (position, "B", torch.int64),
        "ids": (ids, "B", torch.int64),
    }
    kinds = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    given = dict(zip(kinds, (top_k, top_p, min_p), strict=True))
    specs |= {name: (x, "B", kinds[name]) for name, x in given.items() if x is not None}
    sizes = check_tensors(**specs)
    B, V = sizes["B"], sizes["V"]
    if V < 1:
        raise ValueError("logits: expected at least one column, got none")
    if B > MAX_ROWS:
        raise ValueError(f"logits: expected at most {MAX_ROWS} rows, got {B}")
    return V, any(x is not None for x in given.values())


SPEC = KernelSpec("sample/triton", launch, runs_on_cpu=INTERPRETED)
