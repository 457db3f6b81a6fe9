"""`dsv4 bench` without a GPU: what is refused, and the rows of steps that others have timed."""

import json
import weakref
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import dsv4.cli.bench as bench
from dsv4.cli.bench_rows import load_line, load_row
from dsv4.cli.main import HARDWARE, MEMORY, OK, USAGE, build_parser
from dsv4.core.config import ModelConfig
from dsv4.engine import bench as engine_bench
from dsv4.engine.bench import KernelTime, StepTime
from dsv4.engine.engine import Engine
from dsv4.engine.load import Load
from dsv4.engine.model import EngineLimits
from dsv4.engine.roofline import step_bytes
from support.oracle_ops import use_oracles
from support.production import production, random_weights, served_config

STEP = StepTime(200.0, (KernelTime("slow", 2, 150.0), KernelTime("fast", 1, 30.0)), 6.0)
PEAK = 4000.0
COMMON = ["op", "shape", "us", "gbps", "tflops", "roof", "l2", "baseline", "baseline_us", "tps",
          "gpu", "torch", "triton", "commit", "date"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["load", "flash"], "--rate"),
        (["load", "flash", "--rate", "0"], "rate"),
        (["load", "flash", "--rate", "1", "--requests", "0"], "num_requests"),
        (["load", "flash", "--rate", "1", "--prompt-tokens", "9,5"], "prompt_tokens"),
        (["load", "flash", "--rate", "1", "--new-tokens", "9"], "--new-tokens"),
        (["load", "flash", "--rate", "1", "--batch", "4", "8"], "--batch"),
        (["load", "flash", "--rate", "1", "--plot", "a.png"], "--plot"),
        (["decode", "flash", "--rate", "1"], "--rate"),
        (["decode", "flash", "--plot", "a.jpg"], ".png"),
        (["prefill", "flash", "--plot", "a.png"], "--plot"),
        (["decode", "flash", "--context", "0"], "--context"),
    ],
    ids=str,
)
def test_benches_that_cannot_be(dsv4, words, named):
    code, out, err = dsv4("bench", *words)
    assert (code, out) == (USAGE, "")
    assert named in err


def test_a_picture_needs_its_extra_before_anything_runs(dsv4, monkeypatch):
    monkeypatch.setitem(bench.__dict__, "check_device", lambda *args: pytest.fail("too late"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = dsv4("bench", "decode", "flash", "--plot", "a.png")
    assert code == USAGE
    assert "dsv4-inference[plot]" in err


def test_a_load_needs_a_gpu(dsv4):
    code, _, err = dsv4("bench", "load", "nano", "--rate", "2", "--prompt-tokens", "1,9")
    assert code == HARDWARE
    assert "CUDA" in err


@pytest.fixture
def without_gpu(monkeypatch):
    """Steps are not run: all take as long as STEP, a hundred times that in larger batches."""
    config = ModelConfig.flash()
    released, recorded = [], []  # recorded: sizes of prompts, of each stepper
    cache = SimpleNamespace(release=released.append)
    model = SimpleNamespace(
        config=config, cache=cache, weight_bytes=1 << 30, device=SimpleNamespace(type="cpu"),
        recorded=recorded,
    )  # fmt: skip

    def stepper(model, sizes, prompt_sizes):
        return SimpleNamespace(capture=lambda: recorded.append(prompt_sizes))

    monkeypatch.setattr(bench, "check_device", lambda *args: None)
    monkeypatch.setattr(bench, "_build", lambda args, terminal: model)
    monkeypatch.setattr("dsv4.testing.bench.read_gbps", lambda: PEAK)
    monkeypatch.setattr(engine_bench, "fill_contexts", lambda model, n, context: list(range(n)))
    monkeypatch.setattr("dsv4.engine.stepper.Stepper", stepper)
    monkeypatch.setattr(engine_bench, "time_decode", lambda *args: STEP)
    monkeypatch.setattr(engine_bench, "time_prefill", lambda *args: STEP)
    return model


def test_rows_and_picture_of_decode_steps(dsv4, without_gpu, tmp_path):
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "steps.png"
    code, out, err = dsv4(
        "bench", "decode", "flash", "--batch", "1", "8", "--context", "128", "--kernels",
        "--json", str(rows), "--plot", str(picture),
    )  # fmt: skip
    assert code == OK, err
    one, eight = (json.loads(line) for line in rows.read_text().splitlines())
    assert [key for key in one if key in COMMON] == COMMON
    assert one["shape"] == {
        "config": "flash", "layers": 43, "experts": 256, "context": 128, "B": 1,
    }  # fmt: skip
    nbytes = step_bytes(without_gpu.config, 8, 128, experts_hit=6.0).total
    assert eight["gbps"] == pytest.approx(nbytes / 200 / 1e3, rel=1e-3)
    assert eight["roof"] == pytest.approx(nbytes / 200 / 1e3 / PEAK, rel=1e-2)
    assert (eight["tps"], eight["launches"], eight["experts_hit"]) == (40000.0, 3, 6.0)
    assert "B=8: 200 us, 40,000 tokens/s, 3 launches" in out
    assert "slow " in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_step_that_fails_is_named_and_the_others_are_kept(
    dsv4, without_gpu, monkeypatch, tmp_path
):
    held = []

    def time_decode(stepper, requests, trace):
        buffers = Namespace()
        assert not any(row() for row in held)  # rows before this one left nothing behind
        held.append(weakref.ref(buffers))
        if len(requests) == 8:
            raise torch.OutOfMemoryError("out of memory")
        return STEP

    monkeypatch.setattr(engine_bench, "time_decode", time_decode)
    released, rows = [], tmp_path / "rows.jsonl"
    monkeypatch.setattr(without_gpu.cache, "release", released.append)
    sizes = "--batch", "1", "8", "2", "--context", "128"
    code, out, err = dsv4("bench", "decode", "flash", *sizes, "--json", str(rows))
    assert code == MEMORY
    assert "batch 8, context 128: OutOfMemoryError" in err
    assert [json.loads(line)["shape"]["B"] for line in rows.read_text().splitlines()] == [1, 2]
    assert len(released) == 1 + 8 + 2
    assert out.count("tokens/s") == 2


def test_rows_of_prefill(dsv4, without_gpu, tmp_path):
    rows = tmp_path / "rows.jsonl"
    code, out, err = dsv4("bench", "prefill", "flash", "--context", "1000", "--json", str(rows))
    assert code == OK, err
    row = json.loads(rows.read_text())
    assert (row["op"], row["shape"]["T"], row["roof"], row["tps"]) == ("prefill", 1000, None, 5e6)
    assert "tokens/s, 3 launches" in out
    assert without_gpu.recorded == [[1024]]
    code, out, err = dsv4("bench", "prefill", "flash", "--context", "8192")
    assert code == OK, err
    assert without_gpu.recorded[1:] == [[]]  # too long to be recorded


@pytest.mark.parametrize(
    ("batches", "contexts", "x_name", "xs"),
    [([1, 8], [128, 256], "batch", {"context 128": [1, 8], "context 256": [1, 8]}),
     ([4], [128, 256], "context", {"batch 4": [128, 256]}),
     ([4], [128], "batch", {"context 128": [4]})],
    ids=["batches", "contexts", "one"],
)  # fmt: skip
def test_what_the_picture_is_over(monkeypatch, batches, contexts, x_name, xs):
    drawn = []
    monkeypatch.setattr("dsv4.engine.plot.save_roofline", lambda *args: drawn.append(args))
    args = Namespace(batch=batches, context=contexts, plot="a.png", model="pro")
    points = {(b, c): bench_point(b) for b in batches for c in contexts}
    bench._plot(args, points)
    (_, series, name, title) = drawn[0]
    assert (name, title) == (x_name, "decode step of pro")
    assert {label: [p.x for p in own] for label, own in series.items()} == xs


def bench_point(x):
    from dsv4.engine.plot import Point

    return Point(x, STEP, 10.0)


def test_a_row_of_a_load(monkeypatch):
    use_oracles(monkeypatch)
    config = served_config(num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=1)
    engine = Engine(production(config, random_weights(config), limits=EngineLimits(64, 4)))
    args = build_parser().parse_args(["bench", "load", "tiny", "--rate", "500"])
    row = load_row(args, engine, Load(500.0, 5, (1, 8), (2, 4)))
    assert list(row)[: len(COMMON)] == COMMON
    assert row["shape"] == {
        "config": "tiny", "layers": 2, "experts": config.n_routed_experts, "rate": 500.0,
        "requests": 5, "prompt": [1, 8], "new": [2, 4], "B": 4,
    }  # fmt: skip
    for name in ("first_token_ms", "between_tokens_ms"):
        assert 0 < row[name]["p50"] <= row[name]["p95"] <= row[name]["p99"]
    assert row["us"] == pytest.approx(1e3 * row["between_tokens_ms"]["p50"], rel=0.01)
    assert row["tps"] > 0
    line = load_line(row)
    assert "prompt=1,8 new=2,4" in line
    assert "(p50 / p95 / p99)" in line
    json.dumps(row)


def test_limits_of_a_load():
    words = ["bench", "load", "flash", "--rate", "1", "--prompt-tokens", "5,100"]
    args = build_parser().parse_args([*words, "--new-tokens", "1,20", "--batch", "8"])
    limits = bench._limits(args, ModelConfig.flash())
    assert (limits.max_context, limits.max_requests) == (120, 8)
