"""The baseline of benchmarks: compiled for any number of tokens, or left out with a reason."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.reference import routing
from dsv4.testing.bench import COLD_BYTES, CompiledOracle, copies
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
