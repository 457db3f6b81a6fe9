# ruff: noqa: RUF001
"""Spellings of the control tokens that the code addresses; their ids differ between tokenizers.

The bar is U+FF5C and the low line U+2581; both are part of the spelling. Source: tokenizer.json of
DeepSeek-V4-Flash and -Pro.
"""

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
LATEST_REMINDER = "<｜latest_reminder｜>"

# What a prompt of the text model is made of. Every other added token stays text in a prompt.
STRUCTURE = frozenset((BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, DSML, LATEST_REMINDER))
