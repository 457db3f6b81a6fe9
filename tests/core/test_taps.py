"""Taps: off by default, selected by glob, joined over calls."""

from __future__ import annotations

import torch

from dsv4.core.taps import capture, tap


def test_nothing_is_kept_without_a_capture() -> None:
    with capture(["a.*"]) as cap:
        pass
    tap("a.b", torch.ones(1))
    assert cap.tensors() == {}


def test_globs_select_and_copies_are_kept() -> None:
    x = torch.zeros(2, 3)
    with capture(["layers.*.q", "logits"]) as cap:
        tap("layers.1.q", x)
        tap("layers.1.k", x)
        x.add_(1)
    assert list(cap.tensors()) == ["layers.1.q"]
    assert not cap.tensors()["layers.1.q"].any()


def test_calls_are_joined_over_tokens_and_padded() -> None:
    with capture() as cap:
        tap("scores", torch.ones(2, 1))
        tap("scores", torch.ones(1, 3))
        tap("topk", torch.zeros(1, 1, dtype=torch.int64))
        tap("topk", torch.zeros(1, 2, dtype=torch.int64))
    inf = float("inf")
    assert cap.tensors()["scores"].tolist() == [[1, -inf, -inf], [1, -inf, -inf], [1, 1, 1]]
    assert cap.tensors()["topk"].tolist() == [[0, -1], [0, 0]]


def test_captures_nest() -> None:
    with capture() as outer:
        with capture() as inner:
            tap("a", torch.ones(1))
        tap("b", torch.ones(1))
    assert list(inner.tensors()) == ["a"]
    assert list(outer.tensors()) == ["b"]
