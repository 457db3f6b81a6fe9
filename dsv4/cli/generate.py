"""`dsv4 generate`: continue one prompt, streamed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from dsv4.cli.model import (
    Loaded,
    add_runtime_arguments,
    check_prompt,
    check_stop_ids,
    context_limit,
    load_model,
    model_config,
    open_tokenizer,
    shorten,
)
from dsv4.cli.prompt import (
    add_prompt_arguments,
    add_sampling_arguments,
    naming,
    prompt_text,
    render_prompt,
    sampling_params,
)
from dsv4.cli.terminal import AnswerView, Terminal, gib
from dsv4.text.terminal import to_json

if TYPE_CHECKING:
    from dsv4.cli.session import Session, Step

SCHEMA = 1
NUM_LOGPROBS = 10


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    add_runtime_arguments(parser, defaults)
    add_prompt_arguments(parser)
    add_sampling_arguments(parser, max_tokens=128)
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    out.add_argument("--logprobs", metavar="FILE",
                     help="write log probabilities to FILE, one JSON object a token")  # fmt: skip
    out.add_argument("--print-prompt", action="store_true",
                     help="print the prompt and its ids, load no weights")  # fmt: skip
    out.add_argument("--expect", metavar="TEXT",
                     help="fail (exit 1) unless the answer contains TEXT")  # fmt: skip
    out.add_argument("--keep-control-chars", action="store_true",
                     help="print escape sequences of the model as they are")  # fmt: skip


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0, 1 when --expect fails, 130 when interrupted."""
    terminal.keep_control = args.keep_control_chars
    params = sampling_params(args)
    text = prompt_text(args)
    prompt = render_prompt(args, text)
    config = model_config(args.model, terminal if args.print_prompt else None)
    check_stop_ids(args.stop_id, config)
    limit = context_limit(args, config)
    ids = prompt.encode(open_tokenizer(args.model, config))
    check_prompt(ids, limit, shorten("prompt", limit, config))
    if args.print_prompt:
        return _print_prompt(args, terminal, prompt.text, ids)
    loaded = load_model(args, terminal)
    from dsv4.cli.session import Session, peak_bytes

    session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
    thinking = args.think not in (None, "off")
    out_ids, view = [], AnswerView(terminal, silent=args.json)
    with ExitStack() as stack:
        file = None
        if args.logprobs:
            with naming("--logprobs", args.logprobs, "written"):
                file = stack.enter_context(open(args.logprobs, "w", encoding="utf-8"))
        stack.enter_context(session.interrupt.watch())
        steps = session.generate(ids, params, limit, thinking, NUM_LOGPROBS if file else 0)
        for step in steps:
            out_ids.append(step.token_id)
            view.show(step.pieces)
            if file:
                _write_logprobs(file, loaded, len(ids) + len(out_ids) - 1, step)
    view.show(session.answer.close("interrupted"))
    peak = peak_bytes()
    if args.json:
        terminal.json(_report(args, session, loaded, ids, out_ids, view, peak))
    else:
        terminal.data("")
    if len(ids) + len(out_ids) >= limit:
        fix = shorten("prompt", limit, config)
        terminal.note(f"the context of {limit:,} tokens is full: {fix}")
    terminal.note(f"load {loaded.load_s:.2f} s | {session.stats.line()} | peak {gib(peak)} | "
                  f"tier {args.tier} {args.dtype}")  # fmt: skip
    return _verdict(args, terminal, session, text, view.text)


def _verdict(
    args: Namespace, terminal: Terminal, session: Session, prompt: str, answer: str
) -> int:
    if session.interrupt.requested:
        return 130
    if args.expect is None:
        return 0
    passed = args.expect in answer
    line = f"PASS: {prompt!r} -> {answer!r}"
    if not passed:
        line = f"FAIL: {prompt!r} -> {answer!r}, expected {args.expect!r} in it"
    if args.json:
        terminal.note(line)
    else:
        terminal.data(line)
    return 0 if passed else 1


def _print_prompt(args: Namespace, terminal: Terminal, text: str, ids: list[int]) -> int:
    if args.json:
        terminal.json({"schema": SCHEMA, "prompt": text, "ids": ids})
    else:
        terminal.data(f"{text}\n{ids}")
    return 0


def _write_logprobs(file: IO[str], loaded: Loaded, position: int, step: Step) -> None:
    row = {
        "position": position, "id": step.token_id,
        "text": loaded.tokenizer.decode([step.token_id]), "logprob": _finite(step.logprob),
        "top": [[i, _finite(v)] for i, v in step.top],
    }  # fmt: skip
    print(to_json(row), file=file, flush=True)


def _finite(logprob: float | None) -> float | None:
    """A token without any probability has the log probability null: JSON knows no infinity."""
    return None if logprob == float("-inf") else logprob


def _report(
    args: Namespace, session: Session, loaded: Loaded, prompt: list[int], ids: list[int],
    view: AnswerView, peak: int,
) -> dict[str, Any]:  # fmt: skip
    finish = session.answer.finish
    assert finish is not None  # close() has seen to it
    return {
        "schema": SCHEMA, "model": loaded.name, "tier": args.tier, "dtype": args.dtype,
        "prompt_ids": prompt, "ids": ids, "text": view.text,
        "reasoning": view.reasoning, "finish_reason": finish.reason,
        "matched_stop": finish.matched,
        "stats": {"load_s": loaded.load_s, **asdict(session.stats), "peak_bytes": peak},
    }  # fmt: skip
