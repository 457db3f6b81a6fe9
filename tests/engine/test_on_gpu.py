"""Tier 2 on the device: nano's gate, graphs equal to eager steps, neighbours without effect."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4.nano
from dsv4.cache.request import Step
from dsv4.core.inventory import of_trunk
from dsv4.core.sampling import SamplingParams
from dsv4.core.taps import capture
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.single import SingleSequence
from dsv4.engine.stepper import DECODE_SIZES, Stepper
from dsv4.engine.warm_up import prompts
from dsv4.loader import Checkpoint
from dsv4.model.block import FUSED
from dsv4.text.tokenizer import Tokenizer
from support.decode_digest import digest

pytestmark = pytest.mark.gpu
LIMITS = EngineLimits(max_context=2048, max_requests=8, max_rows=512)
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def model(limits: EngineLimits = LIMITS, **rest: Any) -> ProductionModel:
    checkpoint = Checkpoint.open(dsv4.nano.path())
    stored = checkpoint.stream(keep=of_trunk)
    return ProductionModel(checkpoint.config, stored, "cuda", limits, **rest)


def answers(engine: Engine, work: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    requests = [engine.add(prompt, params) for prompt, params in work]
    while engine.has_work:
        engine.step()
    return [r.tokens for r in requests]


def some_work() -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(0)
    params = [GREEDY, SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=16)]
    sizes = [1, 3, 70, 130, 257, 400, 5, 64, 900, 2]
    return [([rng.randrange(4096) for _ in range(n)], params[n % 2]) for n in sizes]


def test_paris() -> None:
    tokenizer = Tokenizer.open(dsv4.nano.path())
    ids = [tokenizer.bos_id, *tokenizer.encode("The capital of France is")]
    (tokens,) = answers(Engine(model()), [(ids, GREEDY)])
    assert "Paris" in tokenizer.decode(tokens)


def test_graphs_equal_eager_steps() -> None:
    work = some_work()
    graphs = answers(Engine(model()), work)
    eager = model()
    assert graphs == answers(Engine(eager, Stepper(eager, use_graphs=False)), work)


def test_recorded_prompts_leave_the_bits_of_eager_ones() -> None:
    """In the streams and in the whole cache, chunk after chunk of two requests."""
    recorded, eager = model(), model()
    stepper = Stepper(recorded)
    stepper.capture()
    ids = torch.randint(0, 4096, (600,), device="cuda", generator=torch.Generator("cuda"))
    requests = [[m.cache.admit() for _ in range(2)] for m in (recorded, eager)]
    for counts in ((1, 1), (4, 12), (16, 1), (30, 34), (100, 29), (129, 200), (300, 200)):
        n = sum(counts)
        padded = stepper.padded_prompt(n)
        found = []
        for m, own, rows in ((recorded, requests[0], padded), (eager, requests[1], None)):
            step = m.prepare(list(zip(own, counts, strict=True)), rows)
            with torch.inference_mode():
                if rows is None:
                    found.append(m.streams(step, ids[:n], is_prefill=True))
                else:
                    fed = torch.full((rows,), -1, device="cuda")
                    fed[:n] = ids[:n]
                    found.append(stepper.prompt_streams(step, fed)[:n])
            step.commit()
        assert torch.equal(*found), counts
        assert torch.equal(recorded.storage.states, eager.storage.states), counts
        assert torch.equal(recorded.storage.pages, eager.storage.pages), counts
    assert stepper.prompt_sizes == [16, 64, 128, 256, 512]


def test_graphs_of_every_size_equal_eager_steps() -> None:
    """100 requests of different lengths and up to 200 tokens: batches of 64 down to 1."""
    rng, used = random.Random(1), set()
    limits = EngineLimits(max_context=512, max_requests=64, max_rows=512)
    params = [
        SamplingParams(temperature=t, seed=i, max_tokens=rng.randint(20, 200))
        for i, t in enumerate([0.0, 1.0] * 50)
    ]
    work = [([rng.randrange(4096) for _ in range(rng.randint(1, 200))], p) for p in params]
    found = []
    for use_graphs in (True, False):
        own = model(limits)
        stepper = Stepper(own, use_graphs=use_graphs)
        run = stepper.run_decode

        def watched(step: Step, is_filtered: bool, run: Any = run) -> torch.Tensor:
            used.add(len(step.rows.slot))
            return run(step, is_filtered)

        stepper.run_decode = watched
        found.append(answers(Engine(own, stepper), work))
    assert found[0] == found[1]
    assert used == set(DECODE_SIZES)


def test_kernels_that_overlap_have_the_bits_of_kernels_that_do_not() -> None:
    """What a kernel read before the one in front of it had written would differ here."""
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent)])
    env = os.environ | {"CUDA_LAUNCH_BLOCKING": "1", "PYTHONPATH": path}
    call = [sys.executable, "-m", "support.decode_digest"]
    alone = subprocess.run(call, env=env, check=True, capture_output=True, text=True)
    assert alone.stdout.strip() == digest()


def test_alone_or_among_others() -> None:
    work = some_work()
    together = answers(Engine(model()), work)
    engine = Engine(model())
    assert together == [answers(engine, [one])[0] for one in work]


def test_drafts_change_nothing() -> None:
    checkpoint = Checkpoint.open(dsv4.nano.path())
    drafting = ProductionModel(
        checkpoint.config, checkpoint.stream(), "cuda", LIMITS, with_mtp=True
    )
    work = some_work()
    engine = Engine(drafting, DraftingStepper(drafting))
    assert answers(engine, work) == answers(Engine(model()), work)


@pytest.mark.parametrize("unfused", [(), FUSED], ids=["fused", "parts"])
def test_a_recorded_step_of_one_sequence_equals_the_eager_step(unfused: tuple[str, ...]) -> None:
    """Two prompts one after another past 128 tokens; all logits are kept to the end."""
    eager, recorded = (SingleSequence(model(unfused=unfused)) for _ in range(2))
    recorded.capture()
    prompts = [torch.arange(n, device="cuda") * 37 % 4096 for n in (100, 3)]
    found, taps = [], []
    for one in (eager, recorded):
        calls, run = [], one.model.streams

        def watched(*args: Any, calls: list = calls, run: Any = run, **kw: Any) -> torch.Tensor:
            calls.append(args)
            return run(*args, **kw)

        one.model.streams = watched
        rows = []
        for prompt in prompts:
            cache, ids = one.new_cache(), prompt
            for _ in range(140):
                rows.append(one.forward(ids, cache, last_only=True))
                ids = rows[-1].argmax(dim=1)
        assert len(calls) == (2 * 140 if one is eager else 2)  # prompts alone run eagerly
        with capture() as seen:
            rows.append(one.forward(ids, cache))
        found.append(torch.cat(rows))
        taps.append(seen.tensors())
    assert torch.equal(*found)
    assert list(taps[0]) == list(taps[1])
    assert "logits" in taps[1]
    assert all(torch.equal(x, taps[1][name]) for name, x in taps[0].items())


def test_sequences_one_after_another_allocate_nothing() -> None:
    one = SingleSequence(model())
    one.capture()
    held = []
    for n in (7, 300, 40, 7):
        cache = one.new_cache()
        ids = one.forward(torch.arange(n, device="cuda"), cache, last_only=True).argmax(dim=1)
        for _ in range(20):
            ids = one.forward(ids, cache).argmax(dim=1)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == held[1:2] * 3


def test_logits_of_a_row_do_not_depend_on_its_chunk() -> None:
    one = SingleSequence(model())
    ids = torch.randint(0, 4096, (300,), device="cuda", generator=torch.Generator("cuda"))
    whole = one.forward(ids, one.new_cache())
    for chunks in ([200, 100], [256, 44], [130, 85, 85]):
        cache = one.new_cache()
        parts = torch.cat([one.forward(part, cache) for part in ids.split(chunks)])
        assert torch.equal(whole, parts), chunks


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_prefill_step_does_not_wait_for_the_device(is_recorded: bool) -> None:
    stepper = Engine(model()).stepper
    with prompts(stepper.model, 100, stepper.padded_prompt(100) if is_recorded else None) as step:
        assert step is not None
        torch.cuda.set_sync_debug_mode("error")
        try:
            pending = stepper.prefill(step, [1] * 100, [2] * 100, [40, 99])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(pending.wait()) == 2


def test_nothing_is_allocated_or_leaked_by_many_requests() -> None:
    engine = Engine(model())
    work = some_work()
    answers(engine, work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        answers(engine, work)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    cache = engine.model.cache
    assert cache.allocator.num_free == cache.schema.num_pages - 1
