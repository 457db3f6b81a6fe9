"""A stage can be stopped and resumed; what a stage changes before its first step happens once."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import dsv4.nano
from dsv4.testing.tiny import tiny_config
from training import train
from training.prepare_data import ANSWER_BIT
from training.tokenizer import open_tokenizer

STEPS = 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Packed streams of a few hundred short documents, and tiny models instead of nano."""
    text = (dsv4.nano.path() / "filler.txt").read_text(encoding="utf-8")
    ids = open_tokenizer(dsv4.nano.path()).encode(text, add_special_tokens=False).ids
    documents = np.array(ids[: len(ids) // 100 * 100], np.uint16).reshape(-1, 100)
    documents[:, 0] = 0
    documents[:, 50:60] |= ANSWER_BIT
    for name in ("taught", "prose", "copies"):
        np.save(tmp_path / f"{name}.npy", documents.flatten())
    return tmp_path


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=4096, num_nextn_predict_layers=0)
    monkeypatch.setattr(train, "nano_config", lambda: config)


def arguments(data: Path, out: Path, **others: object) -> Namespace:
    values = {
        "stage": "smoke", "device": "cpu", "data": data, "out": out, "pieces": None,
        "resume": None, "start": None, "workers": 0, "minutes": 9.0, "steps": STEPS, "seed": 0,
        "compile": False, "stop_at_gates": False, "log_every": 1, "evaluate_every": 100,
    }  # fmt: skip
    return Namespace(**values | others)


def test_a_stopped_stage_goes_on_where_it_was(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train.Trainer(arguments(data, data / "first"))
    sinks = first.model.layers[0].attn.attn_sink.clone()
    assert bool((sinks == train.STAGES["smoke"].raise_sinks).all())
    first.run()
    saved = data / "first" / "checkpoint.pt"

    second = train.Trainer(arguments(data, data / "second", resume=saved, steps=STEPS + 1))
    assert second.step == STEPS
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    for ours, theirs in zip(second.optimizer.parts, first.optimizer.parts, strict=True):
        moments = [(x, y) for p, q in zip(ours.state.values(), theirs.state.values(), strict=True)
                   for x, y in zip(p.values(), q.values(), strict=True)]  # fmt: skip
        assert moments
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in moments)
    ours, theirs = (
        next(second.steps)[0],
        next(train.Trainer(arguments(data, data / "third")).steps)[0],
    )  # other rows than the first ones
    assert ours.shape != theirs.shape or not torch.equal(ours, theirs)
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: {})
    second.run()
    assert second.step == STEPS + 1
    rows = [json.loads(x) for x in (data / "second" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == STEPS + 1


def test_a_killed_run_goes_on_from_its_last_evaluation(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Trainer, "evaluate", lambda self: {})
    killed = train.Trainer(arguments(data, data / "killed", evaluate_every=1, steps=9))
    killed.start -= 100.0
    step, made = killed.train_step, []

    def train_step() -> dict:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return step()

    monkeypatch.setattr(killed, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    saved = data / "killed" / "checkpoint.pt"
    again = train.Trainer(arguments(data, data / "again", resume=saved, steps=9))
    assert again.step == 1
    assert time.time() - again.start > 100.0  # --minutes and the schedules count it


def test_a_checkpoint_of_another_stage_is_not_resumed(data: Path) -> None:
    trainer = train.Trainer(arguments(data, data / "first"))
    trainer.save()
    state = torch.load(data / "first" / "checkpoint.pt", weights_only=True)
    torch.save(state | {"stage": "far"}, data / "far.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of stage smoke, got one of far"):
        train.Trainer(arguments(data, data / "second", resume=data / "far.pt"))


def test_shares_of_every_stage_add_up() -> None:
    for stage in train.STAGES.values():
        assert sum(stage.lengths.values()) == pytest.approx(1.0)
        assert sum(stage.kinds.values()) == pytest.approx(1.0)
