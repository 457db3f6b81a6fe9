"""The planner against the published totals, against what is allocated and against itself."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.cache.plan import plan, weight_bytes_per_gpu
from dsv4.cache.schema import MAX_PAGES, CacheSchema
from dsv4.cache.storage import CacheStorage
from dsv4.cli.main import main
from dsv4.core.config import LayerKind, ModelConfig
from dsv4.core.errors import RequestError
from dsv4.core.inventory import tensor_specs
from dsv4.core.kv_layout import KvRecord, compressor_state_bytes, layer_bytes

FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()
NANO = replace(ModelConfig.nano(), num_nextn_predict_layers=0)
GIB = 1 << 30


@pytest.mark.parametrize(
    ("config", "weights", "growth", "fixed"),
    [
        (FLASH, 159_609_485_896, "3850.25", 12_206_080 + 44 * 74_880),
        (PRO, 864_704_792_696, "5511.4375", 18_710_528 + 62 * 74_880),
    ],
)
def test_plan_gives_the_published_figures(
    config: ModelConfig, weights: int, growth: str, fixed: int
) -> None:
    p = plan(config, context=1 << 20, batch=1)
    assert p.weight_file_bytes == p.weight_bytes == weights
    assert p.kv_growth == Fraction(growth)
    assert p.kv_fixed_per_request == fixed
    assert p.fits is None
    assert p.spare_bytes is None
    assert p.largest_context is None


def test_plan_of_one_long_flash_request() -> None:
    # 4.04 GB of content in the published table; the pages add 1.3 % of padding.
    p = plan(FLASH, context=1 << 20, batch=1)
    content = 1_048_576 * p.kv_growth
    assert p.pages_per_request == 4096
    assert p.kv_page_set_bytes == 998_208
    assert 4097 * 998_208 <= p.kv_page_bytes < 4097 * 998_208 + 64 * 128  # null page, alignment
    assert content < p.kv_page_bytes < content * Fraction("1.014")
    assert p.total_bytes == p.weight_bytes + p.kv_bytes == 159_609_485_896 + p.kv_bytes


def test_plan_counts_what_every_layer_allocates() -> None:
    p = plan(NANO, context=700, batch=3, page_tokens=128, index_keys="mxfp4")
    pages = 6  # 700 tokens in pages of 128
    kinds = [NANO.layer_kind(j) for j in range(NANO.num_hidden_layers)]
    assert kinds.count(LayerKind.HCA) == 2
    pages_of = sum(layer_bytes(NANO, kind, "mxfp4", 128).page_bytes for kind in kinds)
    ring = KvRecord.of(NANO).page_bytes(128)
    states = sum(ring + compressor_state_bytes(NANO, kind) for kind in kinds)
    assert (p.kv_page_set_bytes, p.kv_fixed_per_request) == (pages_of, states)
    exact = (3 * pages + 1) * pages_of + 3 * states
    assert exact <= p.kv_bytes < exact + 30 * 128  # regions begin on multiples of 128
    assert p.kv_bytes == p.kv_page_bytes + p.kv_fixed_bytes


def test_plan_equals_what_is_allocated() -> None:
    p = plan(NANO, context=700, batch=3, page_tokens=128)
    schema = CacheSchema.of(NANO, num_pages=3 * 6 + 1, num_slots=3, page_tokens=128)
    storage = CacheStorage(schema, "meta")
    assert p.kv_page_bytes == storage.pages.numel()
    assert p.kv_fixed_bytes == storage.states.numel()


def printed_figures(text: str) -> dict[str, Fraction]:
    """The exact figures of `dsv4 plan` as text."""
    patterns = {
        "growth": r"grows by (\S+) bytes a token",
        "token": r"in pages of \d+ tokens by (\S+)",
        "request": r"a request takes (\S+) bytes",
        "pages": r"pages (\S+) x",
        "page": r"pages \S+ x (\S+),",
        "slot": r"window and state (\S+)\n",
        "allocated": r"allocated: (\S+) bytes",
        "shared": r"bytes, (\S+) of them the null page",
    }
    found = {name: re.findall(pattern, text) for name, pattern in patterns.items()}
    return {name: Fraction(values[-1].replace(",", "")) for name, values in found.items()}


@pytest.mark.parametrize("page_tokens", [128, 256])
@pytest.mark.parametrize("keys", ["fp8", "mxfp4"])
@pytest.mark.parametrize("context", [4096, 131072, 1 << 20])
@pytest.mark.parametrize("model", ["flash", "pro"])
def test_printed_bytes_are_those_allocated(
    model: str, context: int, keys: str, page_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = 1 if context == 4096 else 2
    assert main(["plan", model, "--ctx", str(context), "--batch", str(batch), "--index-keys", keys,
                 "--page-tokens", str(page_tokens)]) == 0  # fmt: skip
    figures = printed_figures(capsys.readouterr().out)
    config = getattr(ModelConfig, model)()
    schema = CacheSchema.of(
        config, num_pages=batch * int(figures["pages"]) + 1, num_slots=batch,
        page_tokens=page_tokens, index_keys=keys,
    )  # fmt: skip
    is_small = context == 4096 and page_tokens == 256
    storage = CacheStorage(schema, "cpu" if is_small else "meta")
    both = storage.pages.untyped_storage().nbytes() + storage.states.untyped_storage().nbytes()
    assert figures["allocated"] == both
    entries = storage.layers[2].entries
    assert entries is not None
    assert entries.shape == (schema.num_pages, -(-page_tokens // 4 * 584 // 576) * 576)
    # A page and a slot of the allocated views, whatever the planner and the schema add up to.
    page = sum(view[0].numel() for view in storage.page_views())
    slot = sum(view[0].numel() for view in storage.slot_views())
    assert (figures["page"], figures["slot"]) == (page, slot)
    assert figures["token"] == Fraction(page, page_tokens)
    assert figures["request"] == -(-context // page_tokens) * page + slot
    assert figures["shared"] == both - batch * figures["request"]
    assert page <= figures["shared"] < page + 500 * 128
    assert figures["growth"] == sum(growth_of(config, j, keys) for j in range(len(storage.layers)))
    assert figures["growth"] <= figures["token"] < figures["growth"] * Fraction("1.07")


def growth_of(config: ModelConfig, layer: int, keys: str) -> Fraction:
    """Records that a token adds in a layer: 584 B, and 132 or 68 B of the indexer."""
    kind = config.layer_kind(layer)
    key = {"fp8": 132, "mxfp4": 68}[keys]
    each = {LayerKind.SWA: 0, LayerKind.CSA: 584 + key, LayerKind.HCA: 584}[kind]
    return Fraction(each, max(kind.ratio, 1))


def test_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "nano", "--ctx", "700", "--batch", "3", "--page-tokens", "128"]
    assert main(command) == 0
    figures = printed_figures(capsys.readouterr().out)
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name, key in (
        ("growth", "kv_growth"), ("token", "kv_token_bytes"), ("request", "kv_request_bytes"),
        ("page", "kv_page_set_bytes"), ("slot", "kv_fixed_per_request"), ("allocated", "kv_bytes"),
    ):  # fmt: skip
        assert figures[name] == report[key], name


def test_a_growth_without_a_short_decimal_is_printed_as_a_fraction() -> None:
    from dsv4.cli.plan import _exact

    assert _exact(Fraction(7701, 2)) == "3,850.5"
    assert _exact(Fraction(10000, 3)) == "10,000/3"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1 << 40), st.integers(1, 300), st.sampled_from([128, 256, 384]),
    st.sampled_from(["fp8", "mxfp4"]), st.booleans(),
)  # fmt: skip
def test_pages_within_a_budget_are_the_most_that_fit(
    nbytes: int, num_slots: int, page_tokens: int, keys: str, canary: bool
) -> None:
    sizes = {
        "num_slots": num_slots, "page_tokens": page_tokens, "index_keys": keys, "canary": canary
    }  # fmt: skip
    n = CacheSchema.pages_within(FLASH, nbytes=nbytes, **sizes)
    assert n >= 0
    if n:
        storage = CacheStorage(CacheSchema.of(FLASH, num_pages=n, **sizes), "meta")
        assert storage.pages.numel() + storage.states.numel() <= nbytes
    assert CacheSchema.of(FLASH, num_pages=n + 1, **sizes).nbytes > nbytes


def test_pages_within_a_budget_at_its_edges() -> None:
    one = CacheSchema.of(NANO, num_pages=1, num_slots=3).nbytes
    for nbytes, pages in ((-5, 0), (0, 0), (one - 1, 0), (one, 1)):
        assert CacheSchema.pages_within(NANO, nbytes=nbytes, num_slots=3) == pages
    ten = CacheSchema.of(NANO, num_pages=10, num_slots=3).nbytes
    assert CacheSchema.pages_within(NANO, nbytes=ten, num_slots=3) == 10
    assert CacheSchema.pages_within(NANO, nbytes=ten - 1, num_slots=3) == 9
    windows = replace(NANO, compress_ratios=(0,) * 7)
    assert CacheSchema.pages_within(windows, nbytes=1 << 30, num_slots=1) == MAX_PAGES
    for bad in ({"nbytes": 1.5}, {"nbytes": True}, {"num_slots": 0}, {"page_tokens": 100}):
        name = next(iter(bad))
        with pytest.raises(RequestError, match=f"{name}: expected"):
            CacheSchema.pages_within(NANO, **{"nbytes": 1 << 30, "num_slots": 1} | bad)


@pytest.mark.parametrize(("context", "pages"), [(1, 1), (256, 1), (257, 2)])
def test_contexts_round_up_to_pages(context: int, pages: int) -> None:
    assert plan(NANO, context=context, batch=2).pages_per_request == pages


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 1 << 20), st.integers(1, 64), st.integers(0, 1 << 36), st.integers(1, 4))
def test_largest_context_is_the_last_that_fits(
    context: int, batch: int, memory: int, gpus: int
) -> None:
    p = plan(NANO, context=context, batch=batch, memory_bytes=memory + 1, gpus=gpus)
    assert p.fits == (p.total_bytes <= memory + 1) == (context <= p.largest_context)
    assert p.spare_bytes == memory + 1 - p.total_bytes
    limit = NANO.max_position_embeddings
    if p.largest_context > 0:
        assert plan(NANO, context=p.largest_context, batch=batch, memory_bytes=memory + 1,
                    gpus=gpus).fits  # fmt: skip
    if p.largest_context < limit:
        assert not plan(NANO, context=p.largest_context + 1, batch=batch, memory_bytes=memory + 1,
                        gpus=gpus).fits  # fmt: skip


def test_largest_context_to_the_byte() -> None:
    exact = plan(NANO, context=2560, batch=3).total_bytes
    for memory, context in ((exact, 2560), (exact - 1, 2304)):
        assert plan(NANO, context=1, batch=3, memory_bytes=memory).largest_context == context


def test_one_gpu_holds_one_flash_only_when_it_is_large_enough() -> None:
    small = plan(FLASH, context=131072, batch=4, memory_bytes=140 * GIB)
    assert (small.fits, small.largest_context) == (False, 0)
    pair = plan(FLASH, context=131072, batch=4, gpus=2, memory_bytes=140 * GIB)
    assert (pair.fits, pair.largest_context) == (True, 1 << 20)


def test_a_model_of_windows_alone_has_no_growth() -> None:
    config = replace(NANO, compress_ratios=(0,) * 7)
    p = plan(config, context=100_000, batch=1, memory_bytes=GIB)
    assert p.kv_page_bytes == 0
    assert p.largest_context == config.max_position_embeddings
    assert plan(config, context=1, batch=1, memory_bytes=1000).largest_context == 0


def test_division_among_gpus() -> None:
    specs = tensor_specs(FLASH)
    total = sum(s.nbytes for s in specs.values())
    experts = 44 * 256 * 13_369_344
    whole = [weight_bytes_per_gpu(FLASH, specs.values(), g) for g in (1, 2, 3, 256)]
    assert whole[0] == total
    replicated = 2 * whole[1] - total  # what is held twice
    by_name = sum(
        s.nbytes
        for s in specs.values()
        if not any(
            f".{part}." in f".{s.name}"
            for part in ("experts", "shared_experts", "wq_b", "wo_a", "wo_b", "embed", "head")
        )
    )
    assert replicated == by_name
    divided = total - experts - replicated
    assert whole[2] == 86 * (experts // 256) + -(-divided // 3) + replicated
    assert whole[3] == experts // 256 + -(-divided // 256) + replicated
    # More GPUs than experts leave one expert on the fullest.
    assert weight_bytes_per_gpu(FLASH, specs.values(), 1024) >= experts // 256 + replicated


def test_bad_arguments_are_named() -> None:
    good = {"context": 1000, "batch": 1}
    for name, bad in (
        ("gpus", 0), ("context", 0), ("context", NANO.max_position_embeddings + 1), ("batch", -1),
        ("batch", True), ("context", 10.5), ("memory_bytes", 0), ("page_tokens", 100),
        ("index_keys", "bf16"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"^{name}: expected") as error:
            plan(NANO, **{**good, name: bad})
        assert error.value.argument == name
