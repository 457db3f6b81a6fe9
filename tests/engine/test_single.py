"""One sequence whose steps of one token replay a graph; a stand-in for the graph on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dsv4.engine.single as module
from dsv4.cache.request import CachedRequest, Step
from dsv4.core.errors import DeviceUnavailable, RequestError
from dsv4.core.taps import capture
from dsv4.engine.graphs import record
from dsv4.engine.model import EngineLimits
from dsv4.engine.single import SingleSequence
from support.oracle_ops import use_oracles
from support.production import production, random_ids, random_weights, served_config
from support.recorder import Recorder

CONFIG = served_config(num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)
WEIGHTS = random_weights(CONFIG)
PROMPTS = [random_ids(CONFIG, n, seed=n) for n in (122, 1, 5)]
STEPS = 8  # past 128 tokens, where an entry of HCA is completed


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    use_oracles(monkeypatch)
    found = Recorder()
    monkeypatch.setattr(module, "record", found)
    # A graph reads the buffers on the device, whichever step they are of by now.
    monkeypatch.setattr(Step, "rows", property(lambda step: step._rows))
    return found


def sequence(is_recorded: bool) -> SingleSequence:
    limits = EngineLimits(max_context=256, max_rows=64)
    one = SingleSequence(production(CONFIG, WEIGHTS, limits=limits))
    if is_recorded:
        one.capture()
    return one


def answered(one: SingleSequence, prompt: Tensor, cache: CachedRequest | None = None) -> Tensor:
    """Logits of the last token of a prompt and of each greedy one after it."""
    cache = cache or one.new_cache()
    rows = [one.forward(prompt, cache, last_only=True)]
    for _ in range(STEPS):
        rows.append(one.forward(rows[-1].argmax(dim=1), cache))
    one.model.cache.check()
    return torch.cat(rows)


def storage(one: SingleSequence) -> tuple[Tensor, Tensor]:
    return one.model.storage.states, one.model.storage.pages


def test_recorded_steps_have_the_bits_of_eager_ones(recorder: Recorder) -> None:
    """Prompts one after another; all logits are kept to the end, so none was overwritten."""
    eager, recorded = sequence(is_recorded=False), sequence(is_recorded=True)
    for prompt in PROMPTS:
        assert torch.equal(answered(recorded, prompt), answered(eager, prompt))
        assert all(map(torch.equal, storage(recorded), storage(eager)))
    assert recorder.num_replays == len(PROMPTS) * STEPS + 1  # one prompt has a single id


def test_recording_touches_no_cache(recorder: Recorder) -> None:
    eager, recorded = sequence(is_recorded=False), sequence(is_recorded=False)
    caches = [one.new_cache() for one in (eager, recorded)]
    for one, cache in zip((eager, recorded), caches, strict=True):
        one.forward(PROMPTS[0], cache)
    recorded.capture()
    recorded.capture()  # a second time too
    assert all(map(torch.equal, storage(recorded), storage(eager)))
    assert caches[1].length == len(PROMPTS[0])
    found = [answered(one, PROMPTS[2], c) for one, c in zip((eager, recorded), caches, strict=True)]
    assert torch.equal(*found)
    assert recorder.num_replays == STEPS


def test_with_taps_on_it_is_eager(recorder: Recorder) -> None:
    taps = []
    for is_recorded in (False, True):
        one = sequence(is_recorded)
        with capture() as seen:
            answered(one, PROMPTS[2])
        taps.append(seen.tensors())
    assert recorder.num_replays == 0
    assert list(taps[0]) == list(taps[1])
    assert len(taps[1]["logits"]) == 1 + STEPS
    assert len(taps[1]["layers.2.streams"]) == len(PROMPTS[2]) + STEPS
    assert all(torch.equal(x, taps[1][name]) for name, x in taps[0].items())
    answered(one, PROMPTS[2])
    assert recorder.num_replays == STEPS


def test_a_failed_replay_releases_the_sequence(recorder: Recorder) -> None:
    one = sequence(is_recorded=True)
    cache = one.new_cache()
    one.forward(PROMPTS[2], cache)
    recorder.broken = True
    with pytest.raises(RuntimeError, match="lost"):
        one.forward(PROMPTS[1], cache)
    one.model.cache.check()
    assert one.model.cache.num_free_slots == one.model.cache.schema.num_slots
    assert one.model.cache.allocator.num_free == one.model.cache.schema.num_pages - 1
    recorder.broken = False
    assert torch.equal(answered(one, PROMPTS[1]), answered(sequence(False), PROMPTS[1]))


def test_bad_ids_never_reach_the_graph(recorder: Recorder) -> None:
    one = sequence(is_recorded=True)
    cache = one.new_cache()
    one.forward(random_ids(CONFIG, 256), cache)
    for ids in ([CONFIG.vocab_size], [-1], [0]):  # the last has no room
        with pytest.raises(RequestError, match="ids"):
            one.forward(torch.tensor(ids), cache)
    assert (recorder.num_replays, cache.length) == (0, 256)


def test_a_cpu_records_nothing() -> None:
    with pytest.raises(DeviceUnavailable, match="cpu"):
        record(lambda: torch.zeros(1), torch.device("cpu"))
