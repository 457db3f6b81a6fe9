"""Drafts change how many steps an answer takes, and not one of its tokens."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

import pytest
import torch

import dsv4.nano
from dsv4.core.errors import RequestError
from dsv4.core.sampling import SamplingParams
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import EngineLimits, ProductionModel
from dsv4.engine.stepper import Pending
from dsv4.loader import Checkpoint
from dsv4.model.block import FUSED
from dsv4.model.mtp import MtpBlock
from dsv4.text.tokenizer import Tokenizer
from support.fusions import watch_fused
from support.oracle_ops import use_oracles
from support.production import production, random_ids, random_weights, reference, served_config

TINY = served_config(
    num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, num_nextn_predict_layers=1
)
WEIGHTS = random_weights(TINY)


@pytest.fixture(autouse=True)
def oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)


def limits(**fields: int) -> EngineLimits:
    return EngineLimits(**{"max_context": 512, "max_requests": 3, "max_rows": 64} | fields)


def tiny(with_mtp: bool, **fields: int) -> ProductionModel:
    return production(TINY, WEIGHTS, limits=limits(**fields), with_mtp=with_mtp)


@cache
def nano_weights():
    checkpoint = Checkpoint.open(dsv4.nano.path())
    return checkpoint.config, checkpoint.load()


def nano(with_mtp: bool) -> ProductionModel:
    config, weights = nano_weights()
    return production(config, weights, limits=limits(), with_mtp=with_mtp)


def answers(model: ProductionModel, work: list[tuple[list[int], SamplingParams]]):
    """Tokens and reasons, and the number of decode steps."""
    engine = Engine(model, DraftingStepper(model) if model.mtp else None)
    steps, decode = [], engine.stepper.decode
    engine.stepper.decode = lambda *a: (steps.append(1), decode(*a))[1]  # type: ignore[method-assign]
    requests = [engine.add(prompt, params) for prompt, params in work]
    while engine.has_work:
        engine.step()
        engine.model.cache.check()
    cache = model.cache
    assert cache.num_free_slots == cache.schema.num_slots
    return [(r.tokens, r.finish_reason) for r in requests], len(steps)


def test_right_drafts_save_steps() -> None:
    tokenizer = Tokenizer.open(dsv4.nano.path())
    texts = ["The capital of France is", "The capital of Japan is", "The currency of Sweden is the"]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    params = [
        SamplingParams(temperature=0, max_tokens=9),
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
        SamplingParams(temperature=0.7, top_p=0.9, seed=4, max_tokens=12),
    ]
    work = list(zip(prompts, params, strict=True))
    plain, many = answers(nano(with_mtp=False), work)
    drafted, few = answers(nano(with_mtp=True), work)
    assert drafted == plain
    assert few < 0.8 * many


def test_random_drafts_change_nothing() -> None:
    """Untrained drafts, most of them wrong; some of sampled requests are right by chance."""
    sizes = [(1, 0, 7), (130, 0, 6), (5, 1.0, 12), (64, 0.3, 1), (250, 0, 5), (40, 2.0, 9)]
    work = [
        (random_ids(TINY, n, seed=n).tolist(), SamplingParams(temperature=t, seed=n, max_tokens=m))
        for n, t, m in sizes
    ]
    plain, _ = answers(tiny(with_mtp=False), work)
    drafted, _ = answers(tiny(with_mtp=True), work)
    assert drafted == plain


def test_drafts_are_those_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their logits, after a prompt in chunks and after every step, whatever was accepted."""
    config, weights = nano_weights()
    tokenizer = Tokenizer.open(dsv4.nano.path())
    text = "The capital of Peru is Lima. The capital of Kenya is Nairobi. The capital of Chad is "
    prompt = [tokenizer.bos_id, *tokenizer.encode(4 * text)]
    assert len(prompt) > limits().max_rows  # more than one chunk
    model, ref = nano(with_mtp=True), reference(config, weights)
    engine = Engine(model, DraftingStepper(model))
    got, counts = [], []
    logits, decode = MtpBlock.logits, engine.stepper.decode
    monkeypatch.setattr(
        MtpBlock, "logits", lambda *a: (got.append(logits(*a)), got[-1])[1]
    )  # fmt: skip

    def counting(*args) -> Pending:
        counts.append((pending := decode(*args)).wait()[2][0])
        return pending

    engine.stepper.decode = counting  # type: ignore[method-assign]
    request = engine.add(
        prompt, SamplingParams(temperature=1.6, seed=2, max_tokens=30, ignore_eos=True)
    )
    while engine.has_work:
        engine.step()
    ids, cache = torch.tensor([*prompt, *request.tokens]), ref.new_cache()
    streams = ref.forward_streams(ids[:-1], cache)
    expected = ref.forward_mtp(streams, ids[1:], cache)
    assert {1, 2} == set(counts)
    rows = [len(prompt) - 1 + n for n in accumulate(counts, initial=0)]
    for row, own in zip(rows, torch.cat(got), strict=True):
        if row < len(expected):  # the last step may draw more tokens than were wanted
            apart = (own - expected[row]).abs().max() / expected.abs().max()
            assert float(apart) < 1e-3, row


def test_drafts_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {name: watch_fused(monkeypatch, name) for name in FUSED}
    work = [
        (random_ids(TINY, n).tolist(), SamplingParams(temperature=0, max_tokens=6)) for n in (5, 70)
    ]
    parts = production(TINY, WEIGHTS, limits=limits(), with_mtp=True, unfused=FUSED)
    drafted = answers(parts, work)
    assert not any(used.values())
    assert drafted == answers(tiny(with_mtp=True), work)
    # Two rows a request: no step of one row.
    single = "moe_with_shared"
    assert [name for name in FUSED if not used[name]] == [single]
    answers(tiny(with_mtp=False), work)
    assert used[single]


def test_too_few_pages_and_drafts() -> None:
    work = [
        (random_ids(TINY, 110 + i, seed=i).tolist(), SamplingParams(temperature=0, max_tokens=30))
        for i in range(3)
    ]
    plain, _ = answers(tiny(with_mtp=False), work)
    few = tiny(with_mtp=True, page_tokens=128, max_tokens=128)
    assert few.cache.schema.num_pages - 1 == 4
    assert answers(few, work)[0] == plain


def test_the_mtp_window_and_logits_are_those_of_the_reference() -> None:
    ids = random_ids(TINY, 150)
    ref = reference(TINY, WEIGHTS)
    cache = ref.new_cache()
    streams = ref.forward_streams(ids, cache)
    expected = ref.forward_mtp(streams[:-1], ids[1:], cache)
    model = tiny(with_mtp=True, max_rows=256)
    assert model.mtp is not None
    request, got = model.cache.admit(), []
    for first, end in ((0, 100), (100, 131), (131, 149)):
        step = model.prepare([(request, end - first)])
        batch = model.batch(step, ids[first:end], is_prefill=True)
        x = model.trunk.streams(batch, model.storage)
        window = model.storage.layers[TINY.num_hidden_layers]
        got.append(model.mtp.logits(model.mtp.streams(x, ids[first + 1 : end + 1], batch, window)))
        step.commit()
    apart = (torch.cat(got) - expected).abs().amax(dim=1) / expected.abs().max()
    assert float(apart.median()) < 2e-6
    assert float(apart.max()) < 5e-3


def test_what_cannot_draft() -> None:
    with pytest.raises(RequestError, match="with_mtp"):
        production(served_config(), random_weights(served_config()), with_mtp=True)
    with pytest.raises(RequestError, match="with_mtp"):
        DraftingStepper(tiny(with_mtp=False))
    with pytest.raises(RequestError, match="max_requests"):
        DraftingStepper(tiny(with_mtp=True, max_requests=40))
