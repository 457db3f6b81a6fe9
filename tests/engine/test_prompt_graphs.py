"""Steps of prompts that are recorded: padded, replayed, and the same as eager ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4.cache.request import Step
from dsv4.core.sampling import SamplingParams
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.stepper import Stepper
from support.oracle_ops import use_oracles
from support.production import production, random_ids, random_weights, served_config
from support.recorder import Recorder, record_without_a_gpu

CONFIG = served_config(num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
WEIGHTS = random_weights(CONFIG)
PROMPTS = [random_ids(CONFIG, n, seed=n).tolist() for n in (1, 7, 8, 9, 32, 33, 60, 130)]
GREEDY = SamplingParams(temperature=0, max_tokens=5)
LIMITS = EngineLimits(max_context=256, max_requests=4, max_rows=64)
DRAFTED = served_config(
    num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, num_nextn_predict_layers=1
)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    use_oracles(monkeypatch)
    return record_without_a_gpu(monkeypatch)


def model() -> ProductionModel:
    return production(CONFIG, WEIGHTS, limits=LIMITS)


def answers(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    requests = [engine.add(prompt, GREEDY) for prompt in prompts]
    while engine.has_work:
        engine.step()
        engine.model.cache.check()
    return [r.tokens for r in requests]


def test_recorded_prompts_get_the_tokens_of_eager_ones(recorder: Recorder) -> None:
    own, eager = model(), Engine(model())
    stepper = Stepper(own, use_graphs=True, prompt_sizes=(8, 32))
    engine, prefill = Engine(own, stepper), stepper.prefill
    steps: set[tuple[int, int]] = set()  # rows, replays

    def watched(step: Step, *rest: Any) -> Any:
        before = recorder.num_replays
        try:
            return prefill(step, *rest)
        finally:
            steps.add((len(step.rows.slot), recorder.num_replays - before))

    stepper.prefill = watched  # type: ignore[method-assign]
    assert answers(engine, PROMPTS) == answers(eager, PROMPTS)
    for prompt in PROMPTS:
        assert answers(engine, [prompt]) == answers(eager, [prompt])
    # Padded and replayed up to 32 rows; a larger step has the rows it needs and is eager.
    assert {step for step in steps if step[1]} == {(8, 1), (32, 1)}
    assert (64, 0) in steps
    assert all(rows > 32 for rows, replays in steps if not replays)


def test_recording_touches_no_request(recorder: Recorder) -> None:
    own = model()
    engine = Engine(own, Stepper(own, use_graphs=True, prompt_sizes=(8, 32)))
    request = engine.add(PROMPTS[-1], GREEDY)
    for _ in range(5):
        engine.step()
    before = [x.clone() for x in (own.storage.states, own.storage.pages)]
    engine.stepper.capture()
    for old, new in zip(before, (own.storage.states, own.storage.pages), strict=True):
        assert torch.equal(old, new)
    engine.stepper.warm_up()  # with the slots and pages that are free
    while engine.has_work:
        engine.step()
    assert [request.tokens] == answers(Engine(model()), PROMPTS[-1:])


def test_sizes_beyond_the_rows_of_a_step_are_cut(recorder: Recorder) -> None:
    own = model()
    stepper = Stepper(own, use_graphs=True)
    assert stepper.prompt_sizes == [16, 64]
    assert [stepper.padded_prompt(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, None]
    assert Stepper(own, use_graphs=False).padded_prompt(1) is None


def test_drafts_after_recorded_prompts_are_those_after_eager_ones(recorder: Recorder) -> None:
    """The MTP block runs behind the replay, over the same padded rows."""
    weights, engines = random_weights(DRAFTED), []
    for use_graphs in (True, False):
        own = production(DRAFTED, weights, limits=LIMITS, with_mtp=True)
        stepper = DraftingStepper(own, use_graphs=use_graphs, prompt_sizes=(8, 32))
        engines.append(Engine(own, stepper))
    recorded, eager = engines
    assert recorded.stepper.prompt_sizes == [8, 32]
    for prompts in (PROMPTS, *([prompt] for prompt in PROMPTS)):
        before = recorder.num_replays
        assert answers(recorded, prompts) == answers(eager, prompts)
        assert recorder.num_replays > before
        assert torch.equal(recorded.stepper.draft[:-1], eager.stepper.draft[:-1]), prompts
