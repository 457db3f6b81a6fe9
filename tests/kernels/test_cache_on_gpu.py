"""What the interpreter cannot show: CUDA graphs, large shapes, addresses beyond 2^32, compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.ops import cache as ops
from dsv4.reference import cache_writes as oracle
from dsv4.testing.cases.cache import (
    WindowCase,
    cache_calls,
    chunks,
    compressor_case,
    insert_both_args,
    step_append_args,
)
from dsv4.testing.numeric import assert_bits_equal

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("page_tokens", [128, 256])
def test_a_long_prompt_equals_the_oracle(ratio: int, page_tokens: int) -> None:
    case = compressor_case(ratio, 512, 2048, 2, page_tokens=page_tokens, is_exact=True)
    steps = [[(0, 0, 1500), (1, 0, 2047)], [(1, 2047, 1), (0, 1500, 548)]]
    got, want = case.fresh("cuda"), case.fresh()
    for spans in steps:
        for impl, x in ((ops, got), (oracle, want)):
            impl.compressor_insert(**x.insert_args(spans, 3))
            impl.compressor_state_append(**x.append_args(spans, 3))
    assert_bits_equal("state", got.state, want.state)
    assert_bits_equal("pages", got.pages, want.pages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_window_chunk_equals_the_oracle(dtype: torch.dtype) -> None:
    case = WindowCase.random(4, 1000, 512, rows=128, dtype=dtype)
    got, want = case.fresh("cuda"), case.fresh()
    for spans in ([(0, 0, 1000), (2, 0, 50)], [(2, 50, 100), (3, 0, 128)]):
        ops.kv_window_append(**got.append_args(spans, 5))
        oracle.kv_window_append(**want.append_args(spans, 5))
    assert_bits_equal("window", got.window, want.window)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_graph_replays_with_the_tables_of_the_step(is_fused: bool) -> None:
    """One captured decode step of 4 rows serves every step, padding included."""
    case = compressor_case(4, 512, 40, 3, is_exact=True).fresh("cuda")
    keys = compressor_case(4, 128, 40, 3, keys="mxfp4", is_rotated=True, is_exact=True)
    window = WindowCase.random(3, 40, 512, rows=128).fresh("cuda")
    keys, eager = keys.fresh("cuda"), [case.fresh("cuda"), keys.fresh("cuda")]
    eager_window = window.fresh("cuda")

    def calls(c: Any, k: Any, w: Any, spans: Any, pad: int) -> list[tuple[Any, dict[str, Any]]]:
        if is_fused:
            return [
                (ops.entry_and_key_insert, insert_both_args(c, k, spans, pad)),
                (ops.cache_step_append, step_append_args(w, c, k, spans, pad)),
            ]
        return [
            (ops.kv_window_append, w.append_args(spans, pad)),
            (ops.compressor_insert, c.insert_args(spans, pad)),
            (ops.index_key_insert, k.insert_args(spans, pad)),
            (ops.compressor_state_append, c.append_args(spans, pad)),
            (ops.compressor_state_append, k.append_args(spans, pad)),
        ]

    static = calls(case, keys, window, [], 4)
    for op, args in static:  # compile before the capture; padding alone changes nothing
        op(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for op, args in static:
            op(**args)
    for p in range(24):
        spans = [(0, p, 1), (2, p, 1)]
        fresh = calls(case, keys, window, spans, 2)
        for (_, into), (_, args) in zip(static, fresh, strict=True):
            for name, x in args.items():
                if isinstance(x, Tensor) and x.data_ptr() != into[name].data_ptr():
                    into[name].copy_(x)
        graph.replay()
        for op, args in calls(*eager, eager_window, spans, 2):
            op(**args)
    assert_bits_equal("window", window.window, eager_window.window)
    for got, want in zip((case, keys), eager, strict=True):
        assert_bits_equal("pages", got.pages, want.pages)
        assert_bits_equal("state", got.state, want.state)
    assert bool((case.pages != 0xFF).any())


STORES = {
    "window": "slot", "state": "slot", "index_state": "slot", "pages": "page",
    "index_pages": "page", "store": "slot",
}  # fmt: skip


def way_to_the_end(stores: list[Tensor]) -> int:
    """How many rows must come before those of each store to fill more than 4 GiB."""
    return max((2**32 // x[0].nbytes + 1 for x in stores), default=0)


def at_the_end(x: Tensor, moved: int) -> Tensor:
    """A store whose last rows are those of `x`, behind `moved` others."""
    big = torch.zeros((moved + len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
    big[moved:] = x
    return big


@pytest.mark.parametrize("name", sorted(cache_calls(0)))
def test_addresses_beyond_four_gigabytes(name: str) -> None:
    """The same call on small stores, and on the far ends of stores of more than 4 GiB."""
    args = cache_calls(128, head_dim=512, page_tokens=256, device="cuda")[name]
    op = getattr(ops, name.partition("/")[0])
    stores = {s: kind for s, kind in STORES.items() if args.get(s) is not None}
    moved, page_moved = (
        way_to_the_end([args[s] for s, kind in stores.items() if kind == wanted])
        for wanted in ("slot", "page")
    )
    ways = {"slot": moved, "page": page_moved}
    far = args | {s: at_the_end(args[s], ways[kind]) for s, kind in stores.items()}
    index = "page" if "store" in args else "slot"
    far[index] = args[index] + moved
    if "page_table" in args:
        table = args["page_table"]
        far["page_table"] = table.new_zeros((moved + len(table), table.shape[1]))
        far["page_table"][moved:] = table + page_moved * (table > 0)
    near_out, far_out = op(**args), op(**far)
    if near_out is not None:
        assert_bits_equal("out", far_out, near_out)
    for store in stores:
        n = len(args[store])
        assert_bits_equal(store, far[store][-n:], args[store])
        assert not far[store][:-n].any()


@pytest.mark.parametrize(("ratio", "dims", "keys"), [(4, 512, None), (128, 512, None),
                                                   (4, 128, "fp8"), (4, 128, "mxfp4")])  # fmt: skip
def test_long_and_short_steps_give_the_same_bits(ratio: int, dims: int, keys: Any) -> None:
    """In a long step a program looks at several tokens, in a short one at one of them."""
    case = compressor_case(ratio, dims, 1100, 2, keys=keys, is_rotated=True, seed=4)
    ends = []
    for sizes in ((1100,), (257, 3), (100, 156)):
        own = case.fresh("cuda")
        for one in chunks(1100, sizes):
            spans = [*one, (1, *one[0][1:])]
            op = ops.compressor_insert if keys is None else ops.index_key_insert
            op(**own.insert_args(spans))
            ops.compressor_state_append(**own.append_args(spans))
        ends.append(own)
    for other in ends[1:]:
        assert_bits_equal("pages", other.pages, ends[0].pages)
        assert_bits_equal("state", other.state, ends[0].state)
    assert bool((ends[0].pages[1:] != 0xFF).any())


@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
@pytest.mark.parametrize("length", [60, 1100])
def test_one_launch_for_several_stores_equals_the_chain(keys: Any, length: int) -> None:
    """Random numbers, so that a sum taken in another order shows; short steps and long ones."""
    window = WindowCase.random(2, length, 512, rows=128)
    entries = compressor_case(4, 512, length, 2, seed=4)
    index = compressor_case(4, 128, length, 2, keys=keys, is_rotated=True, seed=4)
    chain, fused = ([x.fresh("cuda") for x in (window, entries, index)] for _ in range(2))
    for start, n in ((0, length - 7), (length - 7, 1), (length - 6, 6)):
        spans = [(0, start, n), (1, start, n)]
        ring, *pair = chain
        ops.compressor_insert(**pair[0].insert_args(spans, 3))
        ops.index_key_insert(**pair[1].insert_args(spans, 3))
        ops.kv_window_append(**ring.append_args(spans, 3))
        for x in pair:
            ops.compressor_state_append(**x.append_args(spans, 3))
        ops.entry_and_key_insert(**insert_both_args(*fused[1:], spans, 3))
        ops.cache_step_append(**step_append_args(*fused, spans, 3))
    assert_bits_equal("window", fused[0].window, chain[0].window)
    for got, want in zip(fused[1:], chain[1:], strict=True):
        assert_bits_equal("state", got.state, want.state)
        assert_bits_equal("pages", got.pages, want.pages)
        assert bool((got.pages[1:] != 0xFF).any())


@pytest.mark.parametrize("ratio", [4, 128])
def test_runs_repeat_bit_for_bit(ratio: int) -> None:
    case = compressor_case(ratio, 512, 1024, 2, seed=9)
    runs = []
    for _ in range(3):
        own = case.fresh("cuda")
        ops.compressor_insert(**own.insert_args([(0, 0, 1024), (1, 0, 1000)]))
        runs.append(own.pages)
    assert_bits_equal("second", runs[1], runs[0])
    assert_bits_equal("third", runs[2], runs[0])


def test_torch_compile_keeps_the_write() -> None:
    case = compressor_case(4, 512, 16, is_exact=True)
    plain, compiled = case.fresh("cuda"), case.fresh("cuda")
    args = plain.insert_args([(0, 0, 16)])
    ops.compressor_insert(**args)
    own = args | {"pages": compiled.pages}

    @torch.compile(fullgraph=True)
    def step() -> Tensor:
        ops.compressor_insert(**own)
        return own["pages"].sum(dtype=torch.int64)

    total = step()
    assert_bits_equal("pages", compiled.pages, plain.pages)
    assert_bits_equal("a read after the write", total, plain.pages.sum(dtype=torch.int64))
