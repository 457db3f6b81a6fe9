"""On a GPU: the decode step of `generate` is one CUDA graph."""

import json

import pytest
import torch

from dsv4.cli.main import OK

pytestmark = pytest.mark.gpu


def test_every_token_that_is_generated_is_one_replay(dsv4, monkeypatch, tmp_path):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1]
    )
    words = ["nano", "--tier", "2", "--device", "cuda", "-p", "The capital of France is"]
    code, out, err = dsv4("generate", *words, "-n", "8", "--json", "--expect", "Paris")
    assert code == OK, out + err
    assert len(replays) == json.loads(out)["stats"]["decode_tokens"] > 0
    assert len(set(map(id, replays))) == 1
    replays.clear()
    code, out, err = dsv4("dump", *words, "--decode", "2", "--out", tmp_path / "taps")
    assert code == OK, out + err
    assert not replays
