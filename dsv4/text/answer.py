"""One answer as it arrives: reasoning and text apart, stops found, tokens counted."""

from __future__ import annotations

from collections.abc import Iterable

from dsv4.text.chat import ReasoningSplitter
from dsv4.text.stop import Finish, OutputStream, StopChecker
from dsv4.text.tokenizer import Tokenizer

Piece = tuple[str, str]


class AnswerStream:
    """Turns the ids of one answer into pieces ("reasoning", ...) and ("text", ...).

    thinking      the prompt ended with `<think>`: the answer begins inside the reasoning
    stop_strings  end the answer in its text; the reasoning may contain them
    stop_ids      end it anywhere
    max_tokens    ids taken at most, the one that ends the answer and `</think>` included

    finish        None while the answer goes on
    num_tokens    ids taken
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Iterable[str] = (),
        stop_ids: Iterable[int] = (),
        max_tokens: int | None = None,
        thinking: bool = False,
    ) -> None:
        stop_ids = frozenset(stop_ids)
        self._splitter = ReasoningSplitter(tokenizer, thinking)
        self._streams = {
            "reasoning": OutputStream(tokenizer, StopChecker((), stop_ids), max_tokens),
            "text": OutputStream(tokenizer, StopChecker(stop_strings, stop_ids), max_tokens),
        }
        self._max_tokens = max_tokens
        self.num_tokens = 0
        self.finish: Finish | None = self._streams["text"].finish

    def push(self, token_id: int) -> list[Piece]:
        """The pieces that are certain after `token_id`; none are empty."""
        if self.finish:
            return []
        self.num_tokens += 1
        kind = self._splitter.push(token_id)
        if kind is None:
            pieces = [("reasoning", self._streams["reasoning"].close())]
        else:
            pieces = [(kind, self._streams[kind].push(token_id))]
            self.finish = self._streams[kind].finish
        if self.finish is None and self.num_tokens == self._max_tokens:
            pieces += self.close("length")
        return [p for p in pieces if p[1]]

    def close(self, reason: str = "length") -> list[Piece]:
        """End the answer from outside: the pieces still held."""
        if self.finish:
            return []
        kind = "reasoning" if self._splitter.in_reasoning else "text"
        piece = (kind, self._streams[kind].close(reason))
        self.finish = self._streams[kind].finish
        return [piece] if piece[1] else []
