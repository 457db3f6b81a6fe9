#!/usr/bin/env python3
"""Thousands of short requests through one full engine; then: was an answer wrong, anything lost?

python scripts/soak.py nano                              # 20,000 requests on a GPU
python scripts/soak.py nano --drafts --requests 5000     # with drafts of the MTP block
TRITON_INTERPRET=1 python scripts/soak.py nano --device cpu --requests 20 --pool 4   # slow

Requests are drawn from a pool of questions, each of which the same engine has answered alone
before. Some share their beginning, some are cancelled at random times, and there are too few pages
for all, so that requests make room for each other. The exit code is 1 where an answer is not the
one given alone, where the cache holds a page or a slot afterwards, or where device memory grew.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dsv4.cli.main import tell_errors
from dsv4.cli.model import model_folder
from dsv4.core.inventory import of_trunk
from dsv4.core.sampling import SamplingParams
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.request import EngineRequest
from dsv4.engine.stepper import Stepper
from dsv4.loader.checkpoint import Checkpoint
from dsv4.text.generation import stop_ids

AT_ONCE, WITH_DRAFTS, WAITING = 64, 32, 16  # requests that run, and that wait for a slot
LONGEST_PROMPT, LONGEST_ANSWER = 300, 24
SHARED, SHARES, CANCELLED = (128, 200, 256), 0.25, 0.1  # lengths of beginnings; shares of requests
CANCEL_WITHIN = 40  # steps after a request came
SHOWN = 10  # breaches

Question = tuple[list[int], SamplingParams]
Answer = tuple[list[int], str | None]


@dataclass
class Soak:
    """What a soak has seen; `breaches` is empty where all is well."""

    steps: int = 0
    requests: int = 0
    cancelled: int = 0
    tokens: int = 0
    breaches: list[str] = field(default_factory=list)


def question_pool(count: int, vocab_size: int, rng: random.Random) -> list[Question]:
    """Prompts of random ids; greedy and seeded sampling with and without filters."""

    def ids(n: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(n)]

    beginnings, pool = [ids(n) for n in SHARED], []
    for _ in range(count):
        prompt = ids(rng.randint(1, LONGEST_PROMPT))
        if rng.random() < SHARES:
            prompt = (rng.choice(beginnings) + prompt)[:LONGEST_PROMPT]
        ways: list[dict] = [
            {"temperature": 0}, {"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.9},
            {"temperature": 1.5, "top_k": 20}, {"min_p": 0.05},
        ]  # fmt: skip
        length, seed = rng.randint(1, LONGEST_ANSWER), rng.getrandbits(64)
        pool.append((prompt, SamplingParams(max_tokens=length, seed=seed, **rng.choice(ways))))
    return pool


def answers_alone(engine: Engine, pool: Sequence[Question]) -> list[Answer]:
    """One after the other."""
    answers = []
    for prompt, params in pool:
        request = engine.add(prompt, params)
        while engine.has_work:
            engine.step()
        answers.append((request.tokens, request.finish_reason))
    return answers


def soak(
    engine: Engine, pool: Sequence[Question], answers: Sequence[Answer], count: int,
    rng: random.Random,
) -> Soak:  # fmt: skip
    """Send `count` requests, so that the engine stays full and some wait."""
    seen, live = Soak(), dict[EngineRequest, int]()
    cancels: defaultdict[int, list[EngineRequest]] = defaultdict(list)
    while seen.requests < count or engine.has_work:
        while seen.requests < count and len(live) < engine.model.limits.max_requests + WAITING:
            i = rng.randrange(len(pool))
            request = engine.add(*pool[i])
            live[request] = i
            seen.requests += 1
            if rng.random() < CANCELLED:
                cancels[seen.steps + rng.randrange(CANCEL_WITHIN)].append(request)
        engine.step()
        for request in cancels.pop(seen.steps, ()):
            engine.cancel(request)
        seen.steps += 1
        for request in [r for r in live if r.is_finished]:
            compare(request, answers[live.pop(request)], seen)
    return seen


def compare(request: EngineRequest, alone: Answer, seen: Soak) -> None:
    """An answer must be the one given alone, a cancelled one the beginning of it."""
    tokens, reason = alone
    seen.tokens += len(request.tokens)
    if request.finish_reason == "cancelled":
        seen.cancelled += 1
        tokens, reason = tokens[: len(request.tokens)], "cancelled"
    if (request.tokens, request.finish_reason) != (tokens, reason):
        got = request.tokens, request.finish_reason
        ids = list(request.prompt)
        seen.breaches.append(f"{request.params} after {ids}: alone {(tokens, reason)}, got {got}")


def leaks(engine: Engine) -> list[str]:
    """What the cache holds though no request is left."""
    cache, found = engine.model.cache, []
    try:
        cache.check()
    except AssertionError as error:
        found.append(f"cache: {error or 'an invariant is broken'}")
    slots, pages = cache.schema.num_slots, cache.schema.num_pages - 1
    demand = cache.demand([])
    if cache.num_free_slots != slots:
        found.append(f"slots: {slots - cache.num_free_slots} of {slots} are held")
    if demand.free + demand.reclaimable != pages:
        found.append(f"pages: {pages - demand.free - demand.reclaimable} of {pages} are held")
    if cache.requests:
        found.append(f"requests: the cache knows {len(cache.requests)}")
    return found


def device_bytes(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def build(model: str, device: str, drafts: bool) -> Engine:
    """An engine with a page a request and few more."""
    checkpoint = Checkpoint.open(folder := model_folder(model))
    stored = checkpoint.stream(keep=None if drafts else of_trunk)
    requests = WITH_DRAFTS if drafts else AT_ONCE
    limits = EngineLimits(512, requests, max_tokens=256, prefix_bytes=1 << 26)
    runner = ProductionModel(checkpoint.config, stored, device, limits, with_mtp=drafts)
    stepper = DraftingStepper(runner) if drafts else Stepper(runner)
    return Engine(runner, stepper, stop_ids(folder, checkpoint.config))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano", help="checkpoint folder, or nano")
    parser.add_argument("--device", default="cuda", help="needs a GPU, or TRITON_INTERPRET=1: slow")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--pool", type=int, default=300, help="different questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drafts", action="store_true", help="draft a token a step")
    args = parser.parse_args(argv)
    rng, engine = random.Random(args.seed), build(args.model, args.device, args.drafts)
    pool = question_pool(args.pool, engine.model.config.vocab_size, rng)
    answers = answers_alone(engine, pool)
    before, preempted = device_bytes(engine.model.device), engine.num_preemptions
    began, seen = time.perf_counter(), soak(engine, pool, answers, args.requests, rng)
    seconds = time.perf_counter() - began
    after = device_bytes(engine.model.device)
    print(
        f"{seen.requests:,} requests, {seen.cancelled:,} cancelled, {seen.tokens:,} tokens in "
        f"{seconds:.1f} s: {seen.requests / seconds:,.0f} requests/s, {seen.tokens / seconds:,.0f} "
        f"tokens/s; {seen.steps:,} steps, {engine.num_preemptions - preempted:,} preemptions; "
        f"device memory {before:,} bytes before, {after:,} after"
    )
    breaches = seen.breaches + leaks(engine)
    if after != before:
        breaches.append(f"device memory grew by {after - before:,} bytes")
    for text in breaches[:SHOWN]:
        print(f"FAIL: {text}", file=sys.stderr)
    print(f"{'FAIL' if breaches else 'PASS'}: {len(breaches)} breaches")
    return 1 if breaches else 0


if __name__ == "__main__":
    tell_errors()
    sys.exit(main())
