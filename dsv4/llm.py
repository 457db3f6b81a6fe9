"""The Python API: a checkpoint that answers prompts, many at a time, on the production path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import dsv4.nano
from dsv4.core.errors import RequestError, printable
from dsv4.core.inventory import of_trunk
from dsv4.core.sampling import SamplingParams
from dsv4.engine.drafting import DraftingStepper
from dsv4.engine.engine import Engine
from dsv4.engine.model import DEFAULT_MAX_ROWS, EngineLimits, ProductionModel
from dsv4.engine.request import EngineRequest
from dsv4.engine.stepper import Stepper
from dsv4.loader import Checkpoint
from dsv4.loader.stream import Progress
from dsv4.text.answer import AnswerStream
from dsv4.text.chat import THINKING, Message, encode_chat
from dsv4.text.generation import stop_ids
from dsv4.text.tokenizer import Tokenizer

# Text that is continued, ids, or a conversation that is answered.
Prompt = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Completion:
    """One answer.

    text, reasoning  apart; `reasoning` is "" unless the prompt asked for it
    token_ids        all of it, the id that ended it included
    finish_reason    "stop" or "length"
    """

    text: str
    reasoning: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answer; `outputs` has one element, the shape that vLLM made known."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[Completion, ...]


@dataclass(frozen=True)
class Event:
    """A piece of a streamed answer.

    kind      "text", "reasoning" or "finish"
    text      of the piece; of "finish" the reason: "stop", "length", or "error" where a step failed
              whose exception another stream has seen
    token_id  the token that completed the piece; None for "finish"
    """

    kind: str
    text: str
    token_id: int | None = None


@dataclass
class _Answer:
    """An answer under way: its text, and the events that nobody has taken yet."""

    stream: AnswerStream
    events: list[Event] = field(default_factory=list)
    is_finished: bool = False


class LLM:
    """DeepSeek-V4 on one device.

    model         checkpoint folder, or "nano"
    device        "cuda" or "cuda:N"; on "cpu" the kernels run under TRITON_INTERPRET=1 only
    max_context   tokens of one request, 32,768 or the model's limit unless given
    max_requests  requests that run at a time; others wait
    max_tokens    cache for so many tokens of all requests together; max_context each unless given
    prefix_bytes  host memory for prefixes of prompts that are used again
    drafts        let the MTP block draft a token a step; answers stay what they are

    Weights and cache are allocated here and freed by `close`, or at the end of a with block; all
    kernels are compiled here, none later. One thread at a time. Raises CheckpointError,
    ConfigError, RequestError, CapacityError, DeviceUnavailable.
    """

    def __init__(
        self, model: str | Path = "nano", *, device: str = "cuda", max_context: int | None = None,
        max_requests: int = 16, max_tokens: int | None = None, prefix_bytes: int = 0,
        drafts: bool = False, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        folder = dsv4.nano.path() if model == "nano" else Path(model)
        checkpoint = Checkpoint.open(folder)
        self.config, self.tokenizer = checkpoint.config, Tokenizer.open(folder)
        limits = EngineLimits(
            max_context, max_requests, max_tokens, max(max_requests, DEFAULT_MAX_ROWS), prefix_bytes
        )
        stored = checkpoint.stream(progress, None if drafts else of_trunk)
        runner = ProductionModel(self.config, stored, device, limits, with_mtp=drafts)
        stepper = DraftingStepper(runner) if drafts else Stepper(runner)
        self._engine: Engine | None = Engine(runner, stepper, stop_ids(folder, self.config))
        self._answers: dict[EngineRequest, _Answer] = {}

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """Free the device's memory; a second call does nothing."""
        self._engine = None
        self._answers.clear()

    def generate(
        self, prompts: str | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
        | None = None, thinking: str = "off",
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer every prompt; the outputs are in their order.

        params    for all, or one for each
        thinking  of conversations: "off", "low", "high" or "max"

        Raises RequestError before anything runs.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        own = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(own) != len(prompts):
            raise RequestError("params", f"{len(prompts)}, one a prompt, or a single one", len(own))
        pairs = zip(prompts, own, strict=True)
        requests = self._add_all([(p, q or SamplingParams()) for p, q in pairs], thinking)
        try:
            for request in requests:
                while not self._answers[request].is_finished:
                    self._step()
            return [_output(r, self._answers[r].events) for r in requests]
        finally:
            self._abandon(requests)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, thinking: str = "off"
    ) -> Iterator[Event]:
        """Answer one prompt piece by piece; leaving the loop early cancels it.

        Several streams may be under way: each step of one advances all.
        """
        (request,) = self._add_all([(prompt, params or SamplingParams())], thinking)
        answer = self._answers[request]
        try:
            while answer.events or not answer.is_finished:
                if not answer.events:
                    self._step()
                events, answer.events = answer.events, []
                yield from events
        finally:
            self._abandon([request])

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise RequestError("llm", "an open one", "closed", "make another LLM")
        return self._engine

    def _encode(self, prompt: Prompt, thinking: str) -> tuple[list[int], bool]:
        """The ids, and whether the answer begins with its reasoning."""
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)], False
        if not isinstance(prompt, Sequence):
            raise RequestError("prompt", "a text, ids, or a conversation", prompt)
        items = list(prompt)
        if items and isinstance(items[0], (Message, Mapping)):
            ids = encode_chat(self.tokenizer, [_message(m) for m in items], thinking)
            return ids, thinking != "off"
        return items, False  # type: ignore[return-value]

    def _add_all(
        self, work: Sequence[tuple[Prompt, SamplingParams]], thinking: str
    ) -> list[EngineRequest]:
        """Queue all of them, or none."""
        engine, requests = self._running, []
        if thinking not in THINKING:
            raise RequestError("thinking", f"one of {THINKING}", thinking)
        try:
            for prompt, params in work:
                if not isinstance(params, SamplingParams):
                    raise RequestError("params", "SamplingParams", params)
                ids, is_thinking = self._encode(prompt, thinking)
                request = engine.add(ids, params)
                requests.append(request)
                self._answers[request] = _Answer(
                    AnswerStream(
                        self.tokenizer, params.stop, request.stop_ids, request.max_tokens,
                        is_thinking,
                    )
                )  # fmt: skip
        except BaseException:
            self._abandon(requests)
            raise
        return requests

    def _step(self) -> None:
        """One step of the engine; what became certain goes to the events of its answers.

        A step that fails raises here, and ends the answers of all requests that were in it.
        """
        try:
            known = self._running.step()
        except BaseException:
            for request, answer in self._answers.items():
                if request.finish_reason == "error" and not answer.is_finished:
                    answer.is_finished = True
                    answer.events.append(Event("finish", "error"))
            raise
        for request, token in known:
            answer = self._answers.get(request)
            if answer is None or answer.is_finished:
                continue
            pieces = answer.stream.push(token)
            if request.is_finished and answer.stream.num_tokens == len(request.tokens):
                pieces += answer.stream.close()
            answer.events += [Event(kind, text, token) for kind, text in pieces]
            finish = answer.stream.finish
            if finish is None:
                continue
            if not request.is_finished:  # a stop string: the engine knows ids only
                self._running.cancel(request)
                request.finish_reason = finish.reason
            answer.is_finished = True
            answer.events.append(Event("finish", finish.reason))

    def _abandon(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            if self._answers.pop(request, None) is not None and self._engine is not None:
                self._engine.cancel(request)


def _message(item: object) -> Message:
    if isinstance(item, Message):
        return item
    try:
        return Message(**item)  # type: ignore[arg-type]
    except TypeError as error:
        expected = "messages with 'role' and 'content'"
        raise RequestError("prompt", expected, item, printable(error)) from None


def _output(request: EngineRequest, events: Sequence[Event]) -> RequestOutput:
    text, reasoning = (
        "".join(e.text for e in events if e.kind == kind) for kind in ("text", "reasoning")
    )
    completion = Completion(text, reasoning, tuple(request.tokens), events[-1].text)
    return RequestOutput(request.prompt, (completion,))
