"""Flags of prompts and sampling, shared by the verbs that run a model."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from dsv4.core.config import MAX_VOCAB
from dsv4.core.errors import RequestError, Told, printable
from dsv4.core.numbers import is_integer
from dsv4.core.sampling import SamplingParams
from dsv4.text.chat import THINKING, THINKING_HELP, Message, RenderedPrompt, render_chat
from dsv4.text.special import BOS

# Options whose value may be the word "-".
_TAKE_TEXT = ("-p", "--prompt", "-f", "--file", "--stop", "--system", "--expect")


def add_prompt_arguments(parser: ArgumentParser) -> None:
    """-p, -f or -, and how the text becomes a prompt."""
    group = parser.add_argument_group("prompt (one of)")
    group.add_argument("-p", "--prompt", metavar="TEXT", help="the text itself")
    group.add_argument("-f", "--file", metavar="FILE", action="append", default=[],
                       help="a text file in UTF-8; - alone or -f - is stdin; one final newline "
                       "is not part of the prompt")  # fmt: skip
    kind = parser.add_argument_group("what the text is")
    kind.add_argument("--raw", action="store_true", help="text to continue (the default)")
    kind.add_argument("--chat", action="store_true", help="a user's message, answered directly")
    kind.add_argument(
        "--think",
        choices=THINKING,
        help=f"a user's message; how much to reason first, {THINKING_HELP}",
    )
    kind.add_argument("--system", metavar="TEXT", help="system message of the chat")


def add_sampling_arguments(parser: ArgumentParser, max_tokens: int) -> None:
    """The core six, stops and length. Greedy unless --temp is given."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--temp", type=float, default=0.0, help="0 is greedy (default 0)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    group.add_argument("--min-p", type=float, default=0.0)
    group.add_argument("--seed", type=int, help="makes sampling repeatable")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end the answer at TEXT; may be given several times")  # fmt: skip
    group.add_argument("--stop-id", action="append", default=[], type=int, metavar="ID",
                       help="end the answer at a token id; may be given several times")  # fmt: skip
    group.add_argument("--ignore-eos", action="store_true", help="go on after end of sentence")
    group.add_argument("-n", "--max-tokens", type=int, default=max_tokens,
                       help="tokens to generate at most (default %(default)s)")  # fmt: skip


def sampling_params(args: Namespace) -> SamplingParams:
    """The SamplingParams of the flags. Raises RequestError."""
    return SamplingParams(
        temperature=args.temp, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p,
        seed=args.seed, max_tokens=args.max_tokens, stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_id), ignore_eos=args.ignore_eos,
    )  # fmt: skip


def prompt_text(args: Namespace) -> str:
    """The text of -p, -f or -. Raises RequestError unless there is exactly one."""
    count = len(args.file) + (args.prompt is not None)
    if count != 1:
        came = {0: "none was given", 2: "two were given"}.get(count, f"{count} were given")
        raise RequestError("prompt", "one of -p TEXT, -f FILE and -", Told(came))
    if args.prompt is not None:
        return args.prompt
    file = args.file[0]
    try:
        with naming("--file", file):
            text = utf8_stdin().read() if file == "-" else Path(file).read_text("utf-8")
    except UnicodeDecodeError as e:
        raise not_utf8("stdin" if file == "-" else file, e) from e
    return without_final_newline(text)


def without_final_newline(text: str) -> str:
    """The text of a file as a prompt: one newline at its end ends a line, not the prompt."""
    return re.sub(r"\r?\n\Z", "", text)


def utf8_stdin() -> TextIO:
    """stdin in UTF-8, whatever the locale; reading it raises UnicodeDecodeError."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    return sys.stdin


def not_utf8(where: str, error: UnicodeDecodeError) -> RequestError:
    """The error of a prompt in another encoding."""
    return RequestError("prompt", f"UTF-8 in {where}", str(error), "convert it to UTF-8")


@contextmanager
def naming(flag: str, path: str, use: str = "read") -> Iterator[None]:
    """Turn an OSError of the block into a RequestError that names the flag and the file."""
    try:
        yield
    except OSError as e:
        got = f"{path}: {e.strerror or e}"
        raise RequestError(flag, f"a file that can be {use}", got) from e


def expand_stdin(argv: Sequence[str]) -> list[str]:
    """Write a lone "-" as "-f -": argparse takes no optional positional behind options."""
    out: list[str] = []
    for word in argv:
        is_value = bool(out) and out[-1] in _TAKE_TEXT
        out += ["-f", "-"] if word == "-" and not is_value else [word]
    return out


def is_chat(args: Namespace) -> bool:
    """Whether the text is a message. Raises RequestError for flags that contradict each other."""
    chat = args.chat or args.think is not None
    if args.raw and chat:
        other = "--chat" if args.chat else "--think"
        got = other if args.chat else f"--think {args.think}"
        raise RequestError("--raw", f"no {other} beside it", got, f"leave out --raw or {other}")
    if args.system is not None and not chat:
        expected, fix = "--chat or --think beside it", "add --chat, or leave out --system"
        raise RequestError("--system", expected, "neither", fix)
    return chat


def render_prompt(args: Namespace, text: str) -> RenderedPrompt:
    """The prompt that the flags make of `text`."""
    if not is_chat(args):
        return RenderedPrompt(((True, BOS), (False, text)))
    messages = [Message("user", text)]
    if args.system is not None:
        messages.insert(0, Message("system", args.system))
    return render_chat(messages, args.think or "off")


def read_ids(text: str) -> list[int]:
    """Token ids of "1,2,3" or of "@FILE", a JSON list or an object with a list "ids"."""
    try:
        if text.startswith("@"):
            with naming("--ids", text[1:]):
                content = Path(text[1:]).read_text("utf-8")
            raw: Any = json.loads(content)
            raw = raw.get("ids") if isinstance(raw, dict) else raw
        else:
            raw = [int(x) for x in text.split(",")]
    except RequestError:
        raise
    except (ValueError, RecursionError) as e:
        fix = "write the ids with commas between them: --ids 1,2,3"
        if text.startswith("@"):
            fix = f"correct the file: {printable(str(e))}"
        raise RequestError("--ids", "1,2,3 or @FILE with a JSON list", text, fix) from e
    if not isinstance(raw, list):
        raise RequestError("--ids", "a list of token ids", raw)
    for token_id in raw:
        if not is_integer(token_id) or not 0 <= token_id < MAX_VOCAB:
            raise RequestError("--ids", f"integers from 0 to {MAX_VOCAB - 1}", token_id)
    return raw
