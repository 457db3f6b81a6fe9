"""The soak passes a sound engine and fails one that answers wrong or keeps pages."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.cache.request import CachedRequest
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits
from support.oracle_ops import use_oracles
from support.production import production, random_weights, served_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import soak as script
from soak import Answer, Question, Soak, answers_alone, leaks, question_pool, soak

CONFIG = served_config(num_hidden_layers=2, compress_ratios=(4, 128), num_hash_layers=1)
LIMITS = EngineLimits(512, 8, max_tokens=128, max_rows=256, prefix_bytes=1 << 22, page_tokens=128)
Asked = tuple[list[Question], list[Answer]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A soak leaves it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        use_oracles(patch)
        model = production(CONFIG, random_weights(CONFIG), limits=LIMITS)
        yield Engine(model, stop_ids=frozenset({3}))


@pytest.fixture(scope="module")
def asked(engine: Engine) -> Asked:
    """Few questions, most of them about to need a second page."""
    rng = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "LONGEST_PROMPT", 129)
        patch.setattr(script, "LONGEST_ANSWER", 12)
        patch.setattr(script, "SHARED", (126,))
        patch.setattr(script, "SHARES", 0.8)
        pool = question_pool(8, CONFIG.vocab_size, rng)
    return pool, answers_alone(engine, pool)


def run(engine: Engine, asked: Asked, count: int = 30) -> Soak:
    return soak(engine, *asked, count, random.Random(2))


def test_a_sound_engine(engine: Engine, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "CANCELLED", 0.3)
    monkeypatch.setattr(script, "CANCEL_WITHIN", 12)
    seen = run(engine, asked)
    assert not seen.breaches + leaks(engine)
    assert seen.requests == 30
    assert 2 < seen.cancelled < 15
    assert seen.tokens > 80
    assert engine.num_preemptions > 0


def test_questions_are_of_all_kinds() -> None:
    pool = question_pool(300, CONFIG.vocab_size, random.Random(0))
    sizes = [len(prompt) for prompt, _ in pool]
    assert min(sizes) < 10
    assert max(sizes) == 300
    assert {params.max_tokens for _, params in pool} == set(range(1, 25))
    assert 0.2 < sum(params.is_greedy for _, params in pool) / 300 < 0.5
    firsts = [tuple(prompt[:128]) for prompt, _ in pool if len(prompt) >= 128]
    assert len(firsts) - len(set(firsts)) > 30


def test_a_wrong_answer_is_a_breach(engine: Engine, asked: Asked) -> None:
    pool, answers = asked[0], list(asked[1])
    i = next(i for i, (tokens, _) in enumerate(answers) if len(tokens) > 3)
    tokens, reason = answers[i]
    answers[i] = [*tokens[:-1], tokens[-1] ^ 1], reason
    seen = run(engine, (pool, answers))
    assert seen.breaches
    assert all(str(pool[i][0]) in text for text in seen.breaches)


def test_a_cancelled_answer_may_be_short_but_not_other(engine: Engine) -> None:
    request = engine.add([1, 2, 3])
    engine.cancel(request)
    seen = Soak()
    script.compare(request, ([7, 8], "length"), seen)
    request.tokens.append(7)
    script.compare(request, ([7, 8], "length"), seen)
    assert (seen.cancelled, seen.breaches) == (2, [])
    request.tokens.append(9)
    script.compare(request, ([7, 8], "length"), seen)
    assert len(seen.breaches) == 1


def test_pages_and_slots_that_stay_are_found(
    engine: Engine, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, kept = engine.model.cache, []
    release = cache.release

    def forgetful(request: CachedRequest) -> None:
        if request.length > 125 and not kept:
            kept.append(request)
        else:
            release(request)

    monkeypatch.setattr(cache, "release", forgetful)
    assert not run(engine, asked, 15).breaches
    text = "; ".join(leaks(engine))
    for word in ("slots: 1 of 8", "pages: ", "requests: the cache knows 1"):
        assert word in text
    release(kept[0])
    assert not leaks(engine)
    pages = cache.allocator.take(1)
    assert "cache: " in "; ".join(leaks(engine))
    cache.allocator.release(pages)


@pytest.mark.parametrize(("lost", "grown", "code"), [([], 0, 0), (["pages"], 0, 1), ([], 8, 1)])
def test_the_exit_code(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    lost: list[str], grown: int, code: int,
) -> None:  # fmt: skip
    bytes_held = iter([100, 100 + grown])
    monkeypatch.setattr(script, "build", lambda *args: engine)
    monkeypatch.setattr(script, "LONGEST_PROMPT", 20)
    monkeypatch.setattr(script, "leaks", lambda engine: lost)
    monkeypatch.setattr(script, "device_bytes", lambda device: next(bytes_held))
    assert script.main(["--requests", "8", "--pool", "3"]) == code
    out = capsys.readouterr().out
    assert "8 requests, " in out
    assert ("PASS: 0 breaches" if code == 0 else "FAIL: 1 breaches") in out


def test_it_builds_nano() -> None:
    built = script.build("nano", "cpu", drafts=False)
    assert built.model.limits.max_requests == 64
    assert built.stop_ids
    assert script.build("nano", "cpu", drafts=True).stepper.rows_each == 2


@pytest.mark.gpu
@pytest.mark.parametrize("drafts", [[], ["--drafts"]], ids=["plain", "drafts"])
def test_nano_on_the_device(drafts: list[str]) -> None:
    assert script.main(["nano", "--requests", "500", "--pool", "60", *drafts]) == 0
