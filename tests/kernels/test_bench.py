"""Benchmarks: one failing case is not the end; baselines are compiled once, or left out."""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.reference import routing
from dsv4.testing import bench
from dsv4.testing.bench import COLD_BYTES, Case, CompiledOracle, Later, Turns, copies, later
from dsv4.testing.cases import DEVICE
from dsv4.testing.cases.router import SCALING, router_logits


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledOracle, "spent_s", 0.0)
    monkeypatch.setattr(CompiledOracle, "limit_s", 1e9)


def baseline_of(oracle: Any, shapes: list[list[int]]) -> CompiledOracle:
    """With a compiler that notes the shapes of what it compiles and runs it as it is."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        shapes.append([len(x) for x in inputs if isinstance(x, Tensor)])
        return graph.forward

    return CompiledOracle(oracle, backend=backend)


def topk_args(T: int, E: int = 16) -> dict[str, Any]:
    logits, bias = router_logits(T, E, seed=T, device=DEVICE)
    padding = torch.arange(T, device=DEVICE) % 3 == 1
    return {"logits": logits, "bias": bias, "k": 4, "scaling": SCALING, "is_padding": padding}


def test_it_is_compiled_for_any_number_of_tokens_and_for_one() -> None:
    shapes: list[list[int]] = []
    baseline = baseline_of(routing.router_topk, shapes)
    for T in (40, 30, 9, 2, 1, 3):
        sets = [topk_args(T), topk_args(T)]
        calls = baseline.calls(sets, T)
        assert len(calls) == 2
        for call, args in zip(calls, sets, strict=True):
            for x, y in zip(call(), routing.router_topk(**args), strict=True):
                assert torch.equal(x, y)
    assert len(shapes) == 2


def test_sizes_of_the_model_are_constants() -> None:
    shapes: list[list[int]] = []
    baseline = baseline_of(routing.router_topk, shapes)
    for E in (16, 24, 32):
        assert baseline.calls([topk_args(40, E)], 40)
    assert len(shapes) == 3


def reads_back(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 3 else x


def test_an_oracle_that_does_not_compile_has_no_calls(capsys: pytest.CaptureFixture) -> None:
    assert baseline_of(reads_back, []).calls([{"x": torch.ones(4, device=DEVICE)}], 4) == []
    assert capsys.readouterr().out.startswith("no baseline: reads_back, 4 tokens: ")


def test_compiling_ends_when_its_time_is_used_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    baseline = baseline_of(routing.router_topk, [])
    assert baseline.calls([topk_args(8)], 8)
    assert CompiledOracle.spent_s > 0
    monkeypatch.setattr(CompiledOracle, "limit_s", 0.0)
    assert baseline.calls([topk_args(8)], 8) == []
    assert "0 s of compiling are used up" in capsys.readouterr().out


def test_copies_exceed_the_cache() -> None:
    assert copies(COLD_BYTES) == copies(1 << 40) == 1
    assert copies(COLD_BYTES // 10) in (10, 11)
    assert copies(1, most=7) == 7
    assert partial(copies, 1)() == 48


def timed(case: Case, *_: float) -> list[bench.Row]:
    """Stands in for `measure`: calls, and times nothing."""
    case.calls[0]()
    about = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"), "")
    return [bench.Row(case.op, case.shape, 1.0, 0.0, 0.0, None, "cold", None, None, **about)]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs cases as on a GPU; gives T of the rows written, and the exit status."""
    for name in ("read_gbps", "bf16_tflops"):
        monkeypatch.setattr(bench, name, lambda: 1.0)
    monkeypatch.setattr(bench, "measure", timed)
    monkeypatch.setattr(bench, "_is_device_alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(cases: Turns, *flags: str) -> tuple[list[Any], Any]:
        path, status = tmp_path / "rows.jsonl", 0
        path.write_text("")
        monkeypatch.setattr(sys, "argv", ["bench", "--json", str(path), *flags])
        try:
            bench.run(cases, "cases of a test")
        except SystemExit as end:
            status = end.code
        return [json.loads(x)["shape"]["T"] for x in path.read_text().splitlines()], status

    return run


def broken() -> None:
    raise RuntimeError("no kernel image\nmore")


def case(T: int, op: str = "op") -> Case:
    return Case(op, {"T": T}, [broken if T % 10 == 3 else lambda: None], 1)


@later
def made_late(T: int) -> Case:
    if T % 10 == 4:
        broken()
    return case(T)


def group(start: int, end: int = 3) -> Iterator[Later]:
    for T in range(end):
        yield made_late(start + T)
    broken()


def test_a_case_that_fails_is_reported_and_the_others_are_written(
    rows: Any, capsys: pytest.CaptureFixture
) -> None:
    found, status = rows([case(1), made_late(2), case(3), made_late(4), case(5)])
    assert (found, status) == ([1, 2, 5], "2 cases failed")
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED")]
    assert said == [
        "FAILED: case 2, op {'T': 3}: RuntimeError: no kernel image",
        "FAILED: case 3, made_late [4]: RuntimeError: no kernel image",
    ]


def test_a_group_that_cannot_go_on_ends_alone(rows: Any) -> None:
    assert rows([group(10), case(1), group(20), made_late(2)]) == (
        [10, 11, 12, 1, 20, 21, 22, 2], "2 cases failed"
    )  # fmt: skip


def test_shards_are_all_cases(rows: Any) -> None:
    cases = [made_late(T) for T in (0, 1, 2, 5, 6, 7, 8)]
    parts = [rows(cases, "--shard", f"{i}/3")[0] for i in (1, 2, 3)]
    assert parts == [[0, 5, 8], [1, 6], [2, 7]]
    for text in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ArgumentTypeError, match="expected I/N"):
            bench._shard(text)


def test_once_calls_and_writes_nothing(rows: Any) -> None:
    called: list[int] = []
    cases = [Case("op", {"T": i}, [partial(called.append, i)] * 2, 1) for i in (1, 2)]
    assert rows([*cases, case(3)], "--once") == ([], "1 cases failed")
    assert called == [1, 2]


def test_a_lost_device_is_left_to_a_new_process(rows: Any, monkeypatch: Any) -> None:
    started: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        started.append(command[-4:])
        raise SystemExit("new")

    monkeypatch.setattr(bench, "_is_device_alive", lambda: False)
    monkeypatch.setattr("os.execv", become)
    cases = [case(1), case(3), case(5), case(13), case(7)]
    assert rows(cases) == ([1], "new")
    assert rows(cases, *started[-1]) == ([5], "new")
    assert rows(cases, *started[-1]) == ([7], "2 cases failed")


def test_a_baseline_that_fails_leaves_the_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "_is_device_alive", lambda: True)
    monkeypatch.setattr(bench, "warm_us", lambda calls: calls[0]() or 1.0)
    monkeypatch.setattr(bench, "cold_us", lambda calls, size: calls[0]() or 1.0)
    about = dict.fromkeys(("gpu", "torch", "triton", "commit", "date"), "")
    monkeypatch.setattr(bench, "about", lambda device: about)
    given = Case("op", {"T": 1}, [lambda: None], 1, baseline="b", baseline_calls=[broken])
    assert [(r.us, r.baseline_us) for r in bench.measure(given, 1.0, 1.0)] == [(1.0, None)] * 2
    assert "no baseline: op {'T': 1}: RuntimeError" in capsys.readouterr().out
