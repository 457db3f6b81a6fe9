"""Text to token ids and back, for a byte-level BPE `tokenizer.json`.

The encoder is built from the file *without* its added tokens, so no text, however it is spelled,
can become a control token: those enter a prompt by name only (`control_id`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv4.core.errors import CheckpointError, RequestError
from dsv4.core.safe_files import open_folder, read_json
from dsv4.text.special import BOS, EOS

FILE = "tokenizer.json"
MAX_FILE_BYTES = 64 << 20  # the released file has 7.8 MB
UNKNOWN = "\ufffd".encode()


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    bos_id, eos_id  ids of the begin and end of sentence
    control_ids     ids of every added token, which `encode` never yields
    vocab_size      one more than the largest id
    """

    def __init__(self, raw: Mapping[str, Any], file: str = FILE) -> None:
        """Build from the parsed tokenizer.json. Raises CheckpointError for anything unusable."""
        self._control = _control_tokens(raw, file)
        self._spelling = {i: s for s, i in self._control.items()}
        self.control_ids = frozenset(self._spelling)
        self.bos_id = self._required(BOS, file)
        self.eos_id = self._required(EOS, file)
        self._plain = _plain_encoder(raw, self._control, file)
        ids = [*self._plain.get_vocab().values(), *self.control_ids]
        self.vocab_size = max(ids) + 1
        if len(set(ids)) != len(ids):
            raise _broken(file, "ids that belong to one token each", "an id used twice")

    @classmethod
    def open(cls, folder: str | Path) -> Tokenizer:
        """Read `folder`/tokenizer.json, which must be a plain file of that folder.

        Raises CheckpointError when it is missing, broken or not such a file.
        """
        return cls(read_json(open_folder(folder), FILE, MAX_FILE_BYTES))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Control tokens spelled in `text` stay text; nothing is added."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                "text", "valid Unicode", f"a lone surrogate at character {e.start}",
                "decode the input as UTF-8",
            ) from e  # fmt: skip
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a raw completion prompt: the begin of sentence, then plain text."""
        return [self.bos_id, *self.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Control tokens give their spelling, bytes that are not UTF-8 U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def control_id(self, spelling: str) -> int:
        """Id of the control token spelled so. Raises RequestError when there is none."""
        if spelling not in self._control:
            raise RequestError(
                "control token", "one of this tokenizer's added tokens", spelling,
                "use a tokenizer.json that has it",
            )  # fmt: skip
        return self._control[spelling]

    def control_spelling(self, token_id: int) -> str | None:
        """Spelling of control token `token_id`, None for ordinary ids."""
        return self._spelling.get(token_id)

    @property
    def control_spellings(self) -> tuple[str, ...]:
        """The spelling of every control token."""
        return tuple(self._control)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that `token_id` stands for; U+FFFD for an id that the file does not list."""
        if token_id in self._spelling:
            return self._spelling[token_id].encode()
        token = self._plain.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return UNKNOWN
        table = _byte_of_char()
        return bytes(table[c] for c in token)

    def _required(self, spelling: str, file: str) -> int:
        if spelling not in self._control:
            raise _broken(file, f"an added token {spelling!r}", "none")
        return self._control[spelling]


def _broken(file: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        "tokenizer", file, detail=f"expected {expected}, got {got}",
        fix="fetch tokenizer.json of the model again",
    )  # fmt: skip


def _control_tokens(raw: Any, file: str) -> dict[str, int]:
    """Spelling -> id of the added tokens."""
    added = raw.get("added_tokens") if isinstance(raw, Mapping) else None
    if not isinstance(added, list):
        raise _broken(file, "an object with a list 'added_tokens'", type(raw).__name__)
    out: dict[str, int] = {}
    for token in added:
        spelling = token.get("content") if isinstance(token, Mapping) else None
        token_id = token.get("id") if isinstance(token, Mapping) else None
        if not isinstance(spelling, str) or not spelling:
            raise _broken(file, "added tokens with a non-empty 'content'", repr(token)[:80])
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise _broken(file, f"a non-negative id for {spelling!r}", repr(token_id))
        if out.setdefault(spelling, token_id) != token_id:
            raise _broken(file, f"one id for {spelling!r}", f"{out[spelling]} and {token_id}")
    if len(set(out.values())) != len(out):
        raise _broken(file, "added tokens with ids of their own", "an id used twice")
    return out


def _plain_encoder(raw: Mapping[str, Any], control: Mapping[str, int], file: str) -> Any:
    """The `tokenizers` object of `raw` that knows no added token, as matcher or as vocabulary."""
    from tokenizers import Tokenizer as Encoder

    model = raw.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, Mapping) else None
        raise _broken(file, "a model of type 'BPE'", repr(kind))
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, Mapping) or not isinstance(merges, list):
        raise _broken(file, "a BPE model with 'vocab' and 'merges'", "something else")
    if '"ByteLevel"' not in json.dumps(raw.get("decoder")):
        raise _broken(file, "a ByteLevel decoder", repr(raw.get("decoder"))[:80])
    # The file also lists some control tokens in the base vocabulary. No merge makes them, but
    # `ignore_merges` or a one-character spelling would reach them.
    vocab = {token: i for token, i in vocab.items() if token not in control}
    foreign = set("".join(vocab)) - set(_byte_of_char())
    if foreign:
        raise _broken(file, "byte-level tokens", f"characters {sorted(foreign)[:5]}")
    plain = {**raw, "added_tokens": [], "model": {**model, "vocab": vocab}}
    try:
        return Encoder.from_str(json.dumps(plain))
    except Exception as e:  # what the Rust side raises
        raise _broken(file, "a file that tokenizers can load", str(e)[:200]) from e


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted.

    Printable Latin-1 bytes stand for themselves, the others for U+0100 onwards in order. Source:
    the byte-level BPE of GPT-2, as in the ByteLevel pre-tokenizer.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(rest)}
