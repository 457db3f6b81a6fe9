"""When an answer ends: stop ids, stop strings that may be split over tokens, and length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsv4.core.errors import RequestError
from dsv4.text.detokenize import Detokenizer
from dsv4.text.tokenizer import Tokenizer


class StopChecker:
    """Finds the first stop string in a stream of text and holds back what may become one.

    `push(text)` returns the text that is certain. After a match `matched` is the stop string, and
    neither it nor anything behind it was returned. The stop string that is complete first wins; of
    those complete at the same character, the longest. The result does not depend on how the text
    was cut into pieces. `stop_ids` are only carried along: OutputStream sees the ids.
    """

    def __init__(self, stop_strings: Iterable[str] = (), stop_ids: Iterable[int] = ()) -> None:
        self.stop_strings = tuple(dict.fromkeys(stop_strings))
        self.stop_ids = frozenset(stop_ids)
        if "" in self.stop_strings:
            raise RequestError("stop", "non-empty strings", "", "drop the empty stop string")
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown now that `text` has arrived."""
        if self.matched is not None:
            return ""
        self._held += text
        found = [(self._held.find(s), s) for s in self.stop_strings if s in self._held]
        if found:
            start, self.matched = min(found, key=lambda f: (f[0] + len(f[1]), f[0]))
            out, self._held = self._held[:start], ""
            return out
        cut = len(self._held) - self._possible_start()
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def flush(self) -> str:
        """The text held back, which the end of the stream shows to be ordinary."""
        out, self._held = self._held, ""
        return out

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self.stop_strings):
                return size
        return 0


@dataclass(frozen=True)
class Finish:
    """Why an answer ended: "stop" (with the id or string), "length", or "interrupted"."""

    reason: str
    matched: str | int | None = None


class OutputStream:
    """Ids of one answer to its text: detokenizes, stops, counts.

    num_tokens  ids consumed, the stop id included
    finish      None while the answer goes on
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: StopChecker, max_tokens: int | None = None
    ) -> None:
        if max_tokens is not None and max_tokens < 0:
            raise RequestError("max_tokens", "0 or more", max_tokens)
        self._detokenizer, self._stop = Detokenizer(tokenizer), stop
        self._max_tokens = max_tokens
        self.num_tokens = 0
        self.finish: Finish | None = Finish("length") if max_tokens == 0 else None

    def push(self, token_id: int) -> str:
        """Text that is certain after `token_id`. Ids behind the end of the answer are ignored."""
        if self.finish:
            return ""
        self.num_tokens += 1
        if token_id in self._stop.stop_ids:
            return self._end(Finish("stop", token_id))
        text = self._stop.push(self._detokenizer.push(token_id))
        if self._stop.matched is not None:
            self.finish = Finish("stop", self._stop.matched)
        elif self.num_tokens == self._max_tokens:
            return text + self._end(Finish("length"))
        return text

    def extend(self, token_ids: Iterable[int]) -> str:
        """Text of several ids at once, as a speculative step yields them."""
        return "".join(map(self.push, token_ids))

    def close(self, reason: str = "length") -> str:
        """End the answer from outside and return the text still held; "" if it has ended."""
        return "" if self.finish else self._end(Finish(reason))

    def _end(self, finish: Finish) -> str:
        """Release what is held; a broken last character may still complete a stop string."""
        text = self._stop.push(self._detokenizer.flush())
        if self._stop.matched is not None:
            finish = Finish("stop", self._stop.matched)
        self.finish = finish
        return text + self._stop.flush()
