"""Token ids to text while they arrive, never cutting a character in two."""

from __future__ import annotations

import codecs

from dsv4.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns one stream of ids into text; what `push` and `flush` return joins to the full decode.

    Bytes of an unfinished character are held until it is whole. U+FFFD appears only where the ids
    themselves spell bytes that are not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with `token_id`, often "" inside a character."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What an unfinished character leaves at the end; the detokenizer is then as new."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
