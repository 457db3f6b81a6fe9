"""`dsv4 chat`: a conversation, with /commands."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv4.cli.model import (
    add_runtime_arguments,
    check_prompt,
    check_stop_ids,
    context_limit,
    load_model,
    model_config,
    shorten,
)
from dsv4.cli.prompt import (
    add_sampling_arguments,
    not_utf8,
    sampling_params,
    utf8_stdin,
    without_final_newline,
)
from dsv4.cli.terminal import AnswerView, Terminal, gib
from dsv4.core.errors import RequestError
from dsv4.text.chat import THINKING, THINKING_HELP, Message, encode_chat
from dsv4.text.terminal import to_json

if TYPE_CHECKING:
    from dsv4.cli.session import Session

SCHEMA = 1
FULL = "/new drops the history"
HELP = """\
/think off|low|high|max  how much to reason before an answer
/read FILE               send the text of a file as your message
/save FILE               write the conversation as JSON
/new                     drop the history, keep the system message
/stats                   speed and size of the last answer
/help                    this text
/quit                    leave (also end of input)
Ctrl-C stops the answer, a second one leaves."""


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    add_runtime_arguments(parser, defaults)
    add_sampling_arguments(parser, max_tokens=512)
    parser.add_argument("--think", choices=THINKING, default="off",
                        help=f"how much to reason first (default off), {THINKING_HELP}"
                        )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--keep-control-chars", action="store_true",
                        help="print escape sequences of the model as they are")  # fmt: skip


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0, 130 when interrupted at the prompt."""
    terminal.keep_control = args.keep_control_chars
    chat = Chat(args, terminal)
    terminal.note("/help lists the commands")
    stdin = utf8_stdin()  # once: what has been read cannot be read again in another encoding
    while (line := _read_line(stdin)) is not None:
        if not chat.handle(line):
            break
    return 0


class Chat:
    """One conversation and the model that holds it."""

    def __init__(self, args: Namespace, terminal: Terminal) -> None:
        params = sampling_params(args)
        check_stop_ids(args.stop_id, model_config(args.model))
        loaded = load_model(args, terminal)
        from dsv4.cli.session import Session

        self.terminal, self.params, self.thinking = terminal, params, args.think
        self.limit = context_limit(args, loaded.runner.config)
        self.session: Session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
        self.system = [Message("system", args.system)] if args.system is not None else []
        self.messages = self.system

    def handle(self, line: str) -> bool:
        """Run a command or answer a message; False to leave. Errors are told, not raised."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return False
            if word.startswith("/"):
                self._command(word, rest.strip())
            elif line.strip():
                self.answer(line.strip())
        except BrokenPipeError:  # nobody reads any more
            raise
        except (RequestError, OSError, UnicodeDecodeError) as e:
            fix = getattr(e, "fix", "")
            self.terminal.note(f"error: {e}" + (f"\nfix: {fix}" if fix else ""))
        return True

    def _command(self, word: str, rest: str) -> None:
        if word == "/help":
            self.terminal.note(HELP)
        elif word == "/think":
            if rest not in THINKING:
                raise RequestError("/think", f"one of {', '.join(THINKING)}", rest)
            self.thinking = rest
        elif word in ("/read", "/save") and not rest:
            raise RequestError(word, "FILE behind it", rest, f"write: {word} FILE")
        elif word == "/new":
            self.messages = self.system
            self.session.reset()
            self.terminal.note("the history is gone")
        elif word == "/read":
            self.answer(without_final_newline(Path(rest).read_text("utf-8")))
        elif word == "/save":
            conversation = {"schema": SCHEMA, "messages": [asdict(m) for m in self.messages]}
            Path(rest).write_text(to_json(conversation, indent=2), "utf-8")
            self.terminal.note(f"saved to {rest}")
        elif word == "/stats":
            from dsv4.cli.session import peak_bytes

            self.terminal.note(f"{self.session.stats.line()} | peak {gib(peak_bytes())}")
        else:
            raise RequestError("command", "one that /help lists", word)

    def answer(self, text: str) -> None:
        """Add a user's message, stream the answer, keep both; neither when there is an error."""
        turns = [*self.messages, Message("user", text)]
        session = self.session
        ids = encode_chat(session.tokenizer, turns, self.thinking)
        fix = f"shorten the message; {FULL}" if self.messages != self.system else (
            shorten("message", self.limit, session.runner.config)
        )  # fmt: skip
        check_prompt(ids, self.limit, fix)
        view = AnswerView(self.terminal)
        with session.interrupt.watch():
            for step in session.generate(ids, self.params, self.limit, self.thinking != "off"):
                view.show(step.pieces)
        view.show(session.answer.close("interrupted"))
        self.terminal.data("")
        finish = session.answer.finish
        if finish is not None and finish.reason != "stop":
            is_full = len(ids) + session.answer.num_tokens >= self.limit
            self.terminal.note(f"[{finish.reason}]" + (f" the context is full: {FULL}" * is_full))
        answer = Message("assistant", view.text, view.reasoning)
        self.messages = [*turns, answer]


def _read_line(stdin: TextIO) -> str | None:
    """The next line of the user, None at the end of input. Raises RequestError unless UTF-8."""
    try:
        return input("> ") if stdin.isatty() else stdin.readline() or None
    except EOFError:
        return None
    except UnicodeDecodeError as e:
        raise not_utf8("stdin", e) from e
