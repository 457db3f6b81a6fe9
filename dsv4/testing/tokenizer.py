# ruff: noqa: RUF001
"""A small byte-level BPE tokenizer with DeepSeek-V4's control tokens, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
NAMED = (
    "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<｜User｜>", "<｜Assistant｜>",
    "<|EOT|>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>",
    "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>",
)  # fmt: skip
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
_CORPUS = (
    "The capital of France is Paris. The capital of Germany is Berlin. Hello, how are you today?",
    "A needle in a haystack is hard to find, but the window is only one hundred and twenty eight.",
    "You are a helpful assistant. The user asks a question and the assistant gives an answer.",
    "Grüße aus Köln, naïve café, Ελλάδα, 日本語のテキスト, 中文, 12345 67890, <b>{json: 1}",
)


def write_tokenizer(
    folder: str | Path, vocab_size: int = 600, corpus: Iterable[str] = _CORPUS
) -> Path:
    """Train on `corpus`, write `folder`/tokenizer.json and return its path.

    Control tokens take the first three ids (special) and the last ones (not special), as in the
    real file; pre-tokenizer, decoder and the lack of a normalizer are the real file's too. The
    training is deterministic. `vocab_size` is an upper bound: the built-in corpus gives 479 ids.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in _SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(NAMED), special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), min_frequency=1,
    )  # fmt: skip
    tokenizer.train_from_iterator(list(corpus), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=False) for t in NAMED])
    path = Path(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False), "utf-8")
    return path
