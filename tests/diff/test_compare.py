import json
import os
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from dsv4.core.errors import RequestError
from dsv4.diff.compare import compare_dumps, compare_tensors
from dsv4.diff.dump import DumpInfo, TapDump, write_dump
from dsv4.diff.limits import Limit, Limits
from dsv4.diff.report import to_json, to_text

INFO = DumpInfo(tier=1, dtype="float32", model="tiny", config="c0ffee", ids=(0, 5, 7))
LIMITS = Limits.load()


def taps(seed=0):
    g = torch.Generator().manual_seed(seed)
    T, H, C, D = 6, 4, 8, 10
    return {
        "layers.0.attn.q": torch.randn(T, H, C, generator=g),
        "layers.0.attn.out": torch.randn(T, D, generator=g),
        "layers.0.streams": torch.randn(T, 4, D, generator=g),
        "layers.2.attn.indexer.scores": torch.randn(T, 9, generator=g).tril(),
        "layers.2.attn.indexer.topk": torch.rand(T, 9, generator=g).argsort(1),
        "layers.2.ffn.router.ids": torch.rand(T, 16, generator=g).argsort(1)[:, :3],
        "layers.2.ffn.router.weights": torch.rand(T, 3, generator=g),
        "mtp.0.logits": torch.randn(T - 1, 20, generator=g),
        "logits": torch.randn(T, 20, generator=g),
    }  # fmt: skip


@pytest.fixture
def compare(tmp_path):
    def run(b, a=None, info_b=INFO, info_a=INFO, globs=("*",)):
        write_dump(tmp_path / "a.safetensors", taps() if a is None else a, info_a)
        write_dump(tmp_path / "b.safetensors", b, info_b)
        dumps = (TapDump(tmp_path / f"{x}.safetensors") for x in "ab")
        return compare_dumps(*dumps, LIMITS, globs)

    return run


def test_equal_dumps_agree_in_execution_order(compare):
    report = compare(taps())
    assert report.first_divergence is None
    assert [r.name for r in report.results] == list(taps())
    assert all(r.rel_rms in (0, None) and r.num_differ == 0 for r in report.results)
    assert "all within limits" in to_text(report)


def test_fusions_that_were_off_are_noted(compare):
    parts = replace(INFO, parts=("mhc_post_pre", "cache_step_append"))
    report = compare(taps(), info_b=parts)
    assert report.first_divergence is None
    assert report.notes == ("A runs nothing as parts, B mhc_post_pre, cache_step_append",)
    assert compare(taps(), info_a=parts, info_b=parts).notes == ()


def test_the_first_divergent_tap_is_named_with_its_place(compare):
    b = taps()
    b["layers.0.streams"][4, 2, 7] += 5
    b["layers.0.streams"][1, 0, 0] += 1
    b["logits"] += 1
    report = compare(b)
    first = report.first_divergence
    assert first.name == "layers.0.streams"
    assert first.where == {"token": 4, "stream": 2, "channel": 7}
    assert first.share == pytest.approx(25 / 26)
    assert first.max_abs == pytest.approx(5)
    text = to_text(report)
    assert text.count("FIRST DIVERGENCE") == 1
    assert "token 4, stream 2: 96% of the error, most in channel 7" in text
    assert "everything before it agrees to 0" in text
    assert "first layers.0.streams" in text


def test_head_of_a_query_is_named(compare):
    b = taps()
    b["layers.0.attn.q"][3, 1] *= -1
    first = compare(b).first_divergence
    assert (first.where["token"], first.where["head"], first.share) == (3, 1, 1.0)


def test_the_limit_is_where_the_verdict_turns():
    rule = LIMITS.rule("layers.0.attn.out")
    a = torch.ones(4, 4, dtype=torch.float64)
    for factor, ok in ((0.99, True), (1.01, False)):
        b = a * (1 + factor * rule.float32)
        assert compare_tensors("x", a, b, rule, "float32").ok is ok


def test_the_coarser_dtype_sets_the_limits(compare):
    b = {k: v * 1.01 if v.is_floating_point() else v for k, v in taps().items()}
    assert compare(b).first_divergence is not None
    coarse = DumpInfo(1, "bfloat16", "tiny", "c0ffee", INFO.ids)
    for pair in ({"info_b": coarse}, {"info_a": coarse}):
        report = compare(b, **pair)
        assert report.dtype == "bfloat16"
        assert report.first_divergence is None


def test_order_of_a_set_means_nothing_but_its_members_do(compare):
    b = taps()
    b["layers.2.attn.indexer.topk"] = b["layers.2.attn.indexer.topk"].flip(1)
    assert compare(b).first_divergence is None
    b["layers.2.attn.indexer.topk"][2, 0] = 50
    first = compare(b).first_divergence
    assert (first.name, first.num_differ, first.num_total) == ("layers.2.attn.indexer.topk", 1, 54)
    assert first.where == {"token": 2}
    assert "1 of 54 differ" in to_text(compare(b))


@pytest.mark.parametrize(
    ("a", "b", "differ", "total"),
    [
        ([[1, 2, -1]], [[2, 1, -1]], 0, 2),
        ([[1, 2, -1]], [[2, -1, -1]], 1, 2),
        ([[1, -1, -1]], [[1, 1, -1]], 1, 2),  # an id chosen twice is not the same choice
        ([[1, 2]], [[3, 4]], 2, 2),
        ([[1], [2]], [[2], [1]], 2, 2),  # the same ids in other rows differ
        ([[-1, -1]], [[-1, -1]], 0, 0),
        ([[]], [[]], 0, 0),
    ],
)
def test_sets(a, b, differ, total):
    rule = Limit("x", "set")
    a, b = (torch.tensor(x, dtype=torch.int64) for x in (a, b))
    result = compare_tensors("x", a, b, rule, "float32")
    assert (result.num_differ, result.num_total, result.ok) == (differ, total, differ == 0)


def test_a_shorter_list_of_choices_is_padded(compare):
    b = taps()
    b["layers.2.attn.indexer.topk"] = torch.nn.functional.pad(
        b["layers.2.attn.indexer.topk"], (0, 3), value=-1
    )
    assert compare(b).first_divergence is None
    assert compare(taps(), a=b).first_divergence is None
    b["layers.2.attn.indexer.topk"][1, -1] = 70
    assert compare(b).first_divergence.num_differ == 1


def many_tokens():
    g = torch.Generator().manual_seed(1)
    return {
        "layers.0.attn.out": torch.randn(1000, 8, generator=g),
        "layers.0.ffn.router.ids": torch.rand(1000, 16, generator=g).argsort(1)[:, :3],
        "layers.0.streams": torch.randn(1000, 4, 8, generator=g),
        "layers.1.attn.compressed": torch.randn(250, 8, generator=g),
    }


def test_a_token_that_chose_otherwise_within_the_limit_is_not_judged_any_more(compare):
    a, b = many_tokens(), many_tokens()
    b["layers.0.ffn.router.ids"][7, 0] = 99
    b["layers.0.streams"][7] += 5
    report = compare(b, a=a)
    assert report.first_divergence is None
    by_name = {r.name: r for r in report.results}
    assert by_name["layers.0.attn.out"].num_skipped == 0
    assert by_name["layers.0.streams"].num_skipped == 1
    assert by_name["layers.1.attn.compressed"].num_skipped == 0  # its rows are entries
    assert "1 tokens chose otherwise within a limit" in to_text(report)


def test_other_tokens_and_earlier_taps_are_still_judged(compare):
    a, b = many_tokens(), many_tokens()
    b["layers.0.ffn.router.ids"][7, 0] = 99
    b["layers.0.streams"][8] += 5
    assert compare(b, a=a).first_divergence.where["token"] == 8
    b = many_tokens()
    b["layers.0.ffn.router.ids"][7, 0] = 99
    b["layers.0.attn.out"][7] += 5
    assert compare(b, a=a).first_divergence.name == "layers.0.attn.out"


def test_choices_outside_the_limit_excuse_nothing(compare):
    a, b = many_tokens(), many_tokens()
    b["layers.0.ffn.router.ids"][:100, 0] = 99
    b["layers.0.streams"][7] += 5
    bad = [r.name for r in compare(b, a=a).results if not r.ok]
    assert bad == ["layers.0.ffn.router.ids", "layers.0.streams"]


def test_router_weights_follow_their_ids(compare):
    b = taps()
    for part in ("ids", "weights"):
        b[f"layers.2.ffn.router.{part}"] = b[f"layers.2.ffn.router.{part}"].flip(1)
    assert compare(b).first_divergence is None
    b["layers.2.ffn.router.weights"] = b["layers.2.ffn.router.weights"].flip(1)
    assert compare(b).first_divergence.name == "layers.2.ffn.router.weights"


def test_router_weights_of_other_experts_are_left_to_the_ids(compare):
    b = taps()
    b["layers.2.ffn.router.ids"][1, 0] = 99
    b["layers.2.ffn.router.weights"][1] = 0
    report = compare(b)
    assert [r.name for r in report.results if not r.ok] == ["layers.2.ffn.router.ids"]
    assert {r.name: r.num_skipped for r in report.results}["layers.2.ffn.router.weights"] == 1
    b["layers.2.ffn.router.weights"][4, 2] += 1
    worst = {r.name: r for r in compare(b).results}["layers.2.ffn.router.weights"]
    assert worst.where["token"] == 4


def test_nan_is_a_divergence_and_is_counted(compare):
    b = taps()
    b["layers.0.attn.out"][5, 3] = nan
    first = compare(b).first_divergence
    assert (first.name, first.num_differ) == ("layers.0.attn.out", 1)
    assert first.where == {"token": 5, "channel": 3}
    assert "0 NaN in A, 1 in B; 1 differ" in to_text(compare(b))


@pytest.mark.parametrize(
    ("x", "y", "ok"),
    [(-inf, -inf, True), (inf, inf, True), (nan, nan, False), (inf, -inf, False), (inf, 1, False),
     (nan, inf, False), (0, nan, False)],
)  # fmt: skip
def test_non_finite_pairs(x, y, ok):
    a, b = torch.tensor([[1.0, x]]), torch.tensor([[1.0, y]])
    assert compare_tensors("x", a, b, LIMITS.rule("logits"), "float32").ok is ok


def test_zero_against_something_and_against_zero():
    zero, one = torch.zeros(2, 2), torch.ones(2, 2)
    rule = LIMITS.rule("layers.0.attn.out")
    assert compare_tensors("x", zero, zero, rule, "float32").ok
    assert compare_tensors("x", zero, one, rule, "bfloat16").rel_rms == inf
    assert not compare_tensors("x", one, zero, rule, "bfloat16").ok


def test_empty_tensors_agree():
    a = torch.zeros(0, 8)
    result = compare_tensors("layers.0.attn.compressed", a, a, LIMITS.rule("x"), "float32")
    assert result.ok
    assert result.num_total == 0


def test_other_integers_are_bitwise():
    a = torch.arange(6).reshape(2, 3)
    b = a.clone()
    b[1, 2] += 1
    result = compare_tensors("layers.0.slots", a, b, LIMITS.rule("layers.0.slots"), "bfloat16")
    assert (result.kind, result.ok, result.num_differ) == ("bitwise", False, 1)
    assert result.where == {"token": 1, "channel": 2}


def test_bitwise_rule_on_floats():
    a = torch.tensor([1.0, inf])
    rule = Limit("x", "bitwise")
    assert compare_tensors("x", a, a.clone(), rule, "bfloat16").ok
    assert not compare_tensors("x", a, a + 1e-7, rule, "bfloat16").ok
    assert not compare_tensors("x", a * nan, a * nan, rule, "bfloat16").ok


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_one_wrong_token_among_many_is_a_divergence(scale):
    """The last token zeroed or halved moves the whole tensor by less than its limit."""
    a = torch.randn(2000, 4, 16, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[-1] *= scale
    rule = LIMITS.rule("layers.0.streams")
    result = compare_tensors("layers.0.streams", a, b, rule, "bfloat16")
    assert result.rel_rms < result.limit
    assert not result.ok
    assert result.where["token"] == 1999
    assert "token 1999 alone is off by" in result.note
    near = a * (1 + 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1)))
    assert compare_tensors("layers.0.streams", a, near, rule, "bfloat16").ok


def test_a_dump_replaces_dumps_only(tmp_path):
    info = DumpInfo(1, "float32", "m", "c", (1,))
    out = tmp_path / "a.safetensors"
    for _ in range(2):  # a new name, then an older dump
        write_dump(out, {"x": torch.ones(1)}, info)
    assert out.stat().st_mode & 0o044 == 0o044 & ~_umask()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "shard").write_bytes(b"somebody's weights")
    for name in ("fifo", "link", "shard", "no/where"):
        with pytest.raises(RequestError, match="out: expected"):
            write_dump(tmp_path / name, {"x": torch.ones(1)}, info)
    assert (tmp_path / "shard").read_bytes() == b"somebody's weights"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_shapes_and_kinds_that_do_not_fit_are_named(compare):
    b = taps()
    b["layers.0.streams"] = b["layers.0.streams"][:5]
    report = compare(b)
    assert report.first_divergence.name == "layers.0.streams"
    assert "A [6, 4, 10], B [5, 4, 10]" in to_text(report)
    b = taps()
    b["logits"] = b["logits"].long()
    assert compare(b).first_divergence.kind == "shape"


def test_taps_of_one_side_are_named(compare):
    b = taps()
    del b["logits"]
    b["layers.9.streams"] = torch.zeros(1)
    report = compare(b)
    assert (report.only_a, report.only_b) == (("logits",), ("layers.9.streams",))
    assert "only in A: logits" in to_text(report)
    assert report.first_divergence is None


def test_globs_narrow_the_comparison(compare):
    b = taps()
    b["layers.0.streams"] += 9
    assert compare(b, globs=["logits", "*.attn.*"]).first_divergence is None
    assert len(compare(b, globs=["logits"]).results) == 1


@pytest.mark.parametrize(
    ("change", "word"),
    [({"ids": (0, 5, 8)}, "ids"), ({"config": "other"}, "config")],
)
def test_dumps_of_other_runs_are_refused(compare, change, word):
    other = DumpInfo(**{**INFO.__dict__, **change})
    with pytest.raises(RequestError, match=word):
        compare(taps(), info_b=other)


def test_nothing_in_common_is_refused(compare):
    with pytest.raises(RequestError, match="none in common"):
        compare({"other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("quant", "rounded"),
    [
        ("cache", "keys and values to FP8 and the indexer to MXFP4, as the official cache"),
        ("production", "keys, values and index keys to FP8, as the paged cache"),
        ("another", "'another'"),
    ],
)
def test_other_quantisation_is_noted(compare, quant, rounded):
    other = DumpInfo(**{**INFO.__dict__, "quant": quant})
    note = f"note: A rounds nothing beyond {INFO.dtype}, B {rounded}\n"
    assert note in to_text(compare(taps(), info_b=other))


def test_json_report(compare):
    b = taps()
    b["layers.0.attn.out"] = torch.zeros_like(b["layers.0.attn.out"])
    report = json.loads(json.dumps(to_json(compare(b, a={**taps()})), allow_nan=False))
    assert report["schema"] == 1
    assert report["first_divergence"] == "layers.0.attn.out"
    assert report["taps"][1]["rel_rms"] == pytest.approx(1)
    swapped = to_json(compare(taps(), a=b))
    assert swapped["taps"][1]["rel_rms"] is None  # infinite
    json.dumps(swapped, allow_nan=False)


def test_dump_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    write_dump(path, {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.bfloat16)}, INFO)
    dump = TapDump(path)
    assert (dump.info, dump.names) == (INFO, ["b", "a"])
    assert dump.tensor("a").dtype is torch.bfloat16


def test_files_that_are_no_dumps_are_refused(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "junk").write_bytes(b"\x00" * 40)
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    write_dump(tmp_path / "good", {"a": torch.zeros(1)}, INFO)
    metadata = {"format": "dsv4-taps", "schema": "1", "tier": "1", "dtype": "float32", "model": "m",
                "config": "c", "ids": "1", "quant": "", "order": '["b"]'}  # fmt: skip
    save_file({"a": torch.zeros(1)}, tmp_path / "order", metadata)
    save_file({"a": torch.zeros(1)}, tmp_path / "dtype", metadata | {"dtype": "int8"})
    save_file({"a": torch.zeros(1)}, tmp_path / "schema", metadata | {"schema": "2"})
    TapDump(tmp_path / "good")
    for name in ("absent", "junk", "plain", "order", "dtype", "schema"):
        with pytest.raises(RequestError):
            TapDump(tmp_path / name)


@pytest.mark.parametrize(
    "text",
    ["", "schema = 2", "schema = 1\nlimit = 3", "schema = 1\n[[limit]]\nkind = 'set'", "[[",
     "schema = 1\n[[limit]]\ntap = '*'\ntypo = 1", "schema = 1\n[[limit]]\ntap = '*'\nkind = 'x'",
     "schema = 1\n[[limit]]\ntap = '*'\nfloat32 = -1.0", "schema = 1\n[[limit]]\ntap = 1"],
)  # fmt: skip
def test_broken_limit_tables_are_refused(tmp_path, text):
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(RequestError):
        Limits.load(tmp_path / "limits.toml")


def test_first_matching_rule_counts_and_every_tap_has_one():
    assert LIMITS.rule("layers.3.attn.indexer.topk").kind == "set"
    assert LIMITS.rule("layers.3.attn.q").axes == ("token", "head", "channel")
    assert LIMITS.rule("anything").tap == "*"
    with pytest.raises(RequestError, match="anything"):
        Limits(LIMITS.rules[:-1]).rule("anything")
