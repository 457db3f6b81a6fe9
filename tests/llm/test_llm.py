"""The Python API on the bundled model, with oracles in place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dsv4 import LLM, RequestError, SamplingParams
from dsv4.layers import moe
from dsv4.llm import Event
from dsv4.text.chat import Message
from support.oracle_ops import use_oracles

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        use_oracles(patch)
        with LLM("nano", device="cpu", max_context=512, max_requests=2) as it:
            yield it


def leaves_nothing(llm: LLM) -> None:
    cache = llm._running.model.cache
    assert not llm._answers
    assert cache.num_free_slots == 2


def test_prompts_of_all_kinds(llm: LLM) -> None:
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(JAPAN)]
    chat = [{"role": "user", "content": "What is the capital of Italy?"}]
    outs = llm.generate([FRANCE, ids, chat, [Message("user", "Hello")]], GREEDY)
    texts = [out.outputs[0].text for out in outs]
    assert "Paris" in texts[0]
    assert "Tokyo" in texts[1]
    (rome,) = llm.generate([chat], SamplingParams(temperature=0, max_tokens=12))
    assert "Rome" in rome.outputs[0].text
    assert outs[1].prompt_token_ids == tuple(ids)
    assert all(len(out.outputs[0].token_ids) == 4 for out in outs)
    assert all(out.outputs[0].finish_reason == "length" for out in outs)
    assert llm.generate(FRANCE, GREEDY) == outs[:1]
    leaves_nothing(llm)


def test_stop_strings_and_ids(llm: LLM) -> None:
    stops = SamplingParams(temperature=0, max_tokens=20, stop=(".",))
    (out,) = llm.generate(FRANCE, stops)
    assert out.outputs[0].text.strip() == "Paris"
    assert out.outputs[0].finish_reason == "stop"
    first = out.outputs[0].token_ids[0]
    own = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=(first,))
    (out,) = llm.generate(FRANCE, own)
    assert (out.outputs[0].text, out.outputs[0].token_ids) == ("", (first,))
    leaves_nothing(llm)


def test_streaming_gives_the_same_text(llm: LLM) -> None:
    (whole,) = llm.generate(FRANCE, GREEDY)
    events = list(llm.stream(FRANCE, GREEDY))
    assert "".join(e.text for e in events[:-1]) == whole.outputs[0].text
    assert (events[-1].kind, events[-1].text) == ("finish", "length")
    assert {e.token_id for e in events[:-1]} <= set(whole.outputs[0].token_ids)


def test_leaving_a_stream_early_cancels_it(llm: LLM) -> None:
    stream = llm.stream(FRANCE, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    next(stream)
    stream.close()
    leaves_nothing(llm)
    assert "Tokyo" in llm.generate(JAPAN, GREEDY)[0].outputs[0].text


def test_two_streams_at_once(llm: LLM) -> None:
    one, two = llm.stream(FRANCE, GREEDY), llm.stream(JAPAN, GREEDY)
    texts = ["", ""]
    for i, events in ((0, one), (1, two), (0, one), (1, two), (1, two), (0, one)):
        texts[i] += "".join(e.text for e in [next(events, None)] if e and e.kind == "text")
    for i, events in enumerate((one, two)):
        texts[i] += "".join(e.text for e in events if e.kind == "text")
    assert texts == [llm.generate(p, GREEDY)[0].outputs[0].text for p in (FRANCE, JAPAN)]


@pytest.mark.parametrize(
    ("prompts", "params"),
    [([FRANCE, []], GREEDY), ([FRANCE, [5000]], GREEDY), ([1, 2], GREEDY),
     ([FRANCE], [GREEDY, GREEDY]), ([[1] * 600], GREEDY)],
    ids=["empty", "unknown id", "bare ids", "too many params", "too long"],
)  # fmt: skip
def test_what_is_refused_leaves_nothing(llm: LLM, prompts: list, params: object) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompts, params)  # type: ignore[arg-type]
    leaves_nothing(llm)


def test_closed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    use_oracles(monkeypatch)
    it = LLM(device="cpu", max_context=256, max_requests=1)
    it.close()
    it.close()
    with pytest.raises(RequestError, match="closed"):
        it.generate(FRANCE)


def test_a_failure_ends_every_stream_of_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = llm.stream(FRANCE, GREEDY), llm.stream(JAPAN, GREEDY)
    next(one), next(two)
    oracle, failures = moe.moe_routed, [MemoryError("no room")]

    def failing(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return oracle(*args)

    monkeypatch.setattr(moe, "moe_routed", failing)
    with pytest.raises(MemoryError):
        list(one)
    assert list(two)[-1] == Event("finish", "error")
    leaves_nothing(llm)
    assert "Paris" in llm.generate(FRANCE, GREEDY)[0].outputs[0].text


def test_thinking_is_for_conversations(llm: LLM) -> None:
    (plain,), (told,) = (llm.generate(FRANCE, GREEDY, thinking=t) for t in ("off", "low"))
    assert plain == told
    with pytest.raises(RequestError, match="thinking"):
        llm.generate(FRANCE, GREEDY, thinking="bogus")
    (out,) = llm.generate([[Message("user", "Hello")]], GREEDY, thinking="low")
    assert out.outputs[0].reasoning
    assert not out.outputs[0].text


def test_drafts_change_no_answer(llm: LLM) -> None:
    prompts = [FRANCE, JAPAN, [Message("user", "What is the capital of Italy?")]]
    params = SamplingParams(temperature=0, max_tokens=9)
    with LLM("nano", device="cpu", max_context=512, max_requests=2, drafts=True) as drafting:
        assert drafting.generate(prompts, params) == llm.generate(prompts, params)


@pytest.mark.parametrize(
    "prompt", [[{"role": "user"}], [{"name": "x"}], [Message("user", "a"), 3], 5], ids=str
)
def test_conversations_that_are_none(llm: LLM, prompt: object) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.generate([prompt], GREEDY)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="params"):
        llm.generate(FRANCE, {"temperature": 0})  # type: ignore[arg-type]
    leaves_nothing(llm)
