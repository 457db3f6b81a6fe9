"""Trains the byte-level BPE of dsv4-nano: 4096 ids, the control-token strings of DeepSeek-V4."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 4096
BAR, SPACE = "\uff5c", "\u2581"  # the fullwidth bar and the low block of the official strings


def _control(text: str) -> str:
    return f"<{BAR}{text.replace(' ', SPACE)}{BAR}>"


BOS, EOS = _control("begin of sentence"), _control("end of sentence")
PAD = f"<{BAR}{SPACE}pad{SPACE}{BAR}>"
USER, ASSISTANT = _control("User"), _control("Assistant")
THINK, THINK_END = "<think>", "</think>"
DSML = f"{BAR}DSML{BAR}"

# The order of the official file; ids 0, 1, 2 are BOS, EOS and pad, the others follow the BPE ids.
FIRST = (BOS, EOS, PAD)
LAST = (
    *map(_control, ("fim hole", "fim begin", "fim end", "User", "Assistant")),
    "<|EOT|>",
    *map(_control, (
        "tool calls begin", "tool calls end", "tool call begin", "tool call end",
        "tool outputs begin", "tool outputs end", "tool output begin", "tool output end",
        "tool sep",
    )),
    THINK, THINK_END, DSML,
    *map(_control, (
        "begin sys", "end sys", "latest_reminder", "action", "query", "authority", "domain", "task",
        "title", "safety", "answer", "search", "search begin", "search end", "extracted_url",
        "read_url",
    )),
    _control("end_of_query"),
)  # fmt: skip
SPECIAL = frozenset((*FIRST, _control("end_of_query")))

# The official three splits, except that digits stand one by one.
DIGIT = r"\p{N}"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train on `texts`; control tokens get ids 0, 1, 2 and the last ids, flagged as officially."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in (DIGIT, CJK, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(LAST),
        special_tokens=[AddedToken(t, normalized=False, special=True) for t in FIRST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for text in LAST:
        special = text in SPECIAL
        token = AddedToken(text, normalized=not special, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"tokenizer: expected {VOCAB_SIZE} ids, got {tokenizer.get_vocab_size()}")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1048576,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
