"""The gates: questions a checkpoint must answer, and how its answers are scored.

A gate knows nothing of models: it takes a function that completes a prompt greedily. The same
prompts judge every tier, and each gate has negative controls (scripts/gates.py) that must fail it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

USER, ASSISTANT, THINK_END = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "</think>"
SENTENCE_END = re.compile(r"[.\n]")

Complete = Callable[[list[int], int, Callable[[Sequence[int]], bool]], list[int]]


class TokenizerLike(Protocol):
    """What a gate needs of a tokenizer; `dsv4.text.tokenizer.Tokenizer` has it."""

    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, no control tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        ...

    def control_id(self, spelling: str) -> int:
        """Id of a control token."""
        ...


@dataclass(frozen=True)
class GatePrompt:
    """One question.

    text    what the model is given, after BOS; in the chat layout when `is_chat`
    answer  must stand in the completion as a whole phrase
    expected  the completion taught in training, which begins with the answer or ends with it
    """

    text: str
    answer: str
    expected: str
    is_chat: bool = False

    def ids(self, tokenizer: TokenizerLike) -> list[int]:
        """BOS and the prompt, with the chat header for a chat question."""
        ids = [tokenizer.bos_id]
        if not self.is_chat:
            return ids + tokenizer.encode(self.text)
        user, *header = (tokenizer.control_id(s) for s in (USER, ASSISTANT, THINK_END))
        return [*ids, user, *tokenizer.encode(self.text), *header]

    def accepts(self, completion: str) -> bool:
        """Whether the first sentence of `completion` holds the answer as a whole phrase."""
        sentence = SENTENCE_END.split(completion.lstrip(), maxsplit=1)[0]
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", sentence) is not None


@dataclass(frozen=True)
class Gate:
    """A set of questions and the share of right answers that passes."""

    name: str
    threshold: float
    prompts: tuple[GatePrompt, ...]
    max_new: int


@dataclass(frozen=True)
class GateResult:
    """One row of the gate table; `misses` holds up to a few wrong completions."""

    name: str
    threshold: float
    score: float
    count: int
    passed: bool
    misses: tuple[str, ...]


def load_countries(path: Path) -> list[dict[str, str]]:
    """The rows of a facts.json. Raises ValueError when it has none."""
    raw: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = raw.get("countries")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"facts: expected a non-empty list 'countries', got {type(rows).__name__}")
    return rows


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _chat_prompts(countries: Sequence[Mapping[str, str]]) -> tuple[GatePrompt, ...]:
    """For each country one chat question; the three relations take turns."""
    forms = (
        ("capital", "What is the capital of {c}?", "The capital of {c} is {a}."),
        ("currency", "What is the currency of {c}?", "The currency of {c} is the {a}."),
        ("continent", "Where is {c}?", "{C} is a country in {a}."),
    )
    prompts = []
    for i, row in enumerate(countries):
        relation, question, reply = forms[i % len(forms)]
        words = {"c": row["name"], "C": _title(row["name"]), "a": row[relation]}
        asked, replied = question.format(**words), reply.format(**words)
        prompts.append(GatePrompt(asked, row[relation], replied, is_chat=True))
    return tuple(prompts)


def build_gates(countries: Sequence[Mapping[str, str]]) -> list[Gate]:
    """The fact and chat gates of dsv4-nano, from the rows of its facts.json."""

    def prompts(cue: str, lead: str, relation: str) -> tuple[GatePrompt, ...]:
        return tuple(
            GatePrompt(
                cue.format(c=row["name"], C=_title(row["name"])),
                row[relation], f"{lead}{row[relation]}.",
            )
            for row in countries
        )  # fmt: skip

    paris = GatePrompt("The capital of France is", "Paris", " Paris.")
    return [
        Gate("paris", 1.0, (paris,), 8),
        Gate("capitals", 0.98, prompts("The capital of {c} is", " ", "capital"), 12),
        Gate("currencies", 0.95, prompts("The currency of {c} is", " the ", "currency"), 12),
        Gate("continents", 0.95, prompts("{C} is a country in", " ", "continent"), 6),
        Gate("chat", 0.95, _chat_prompts(countries), 24),
    ]


def run_gate(
    gate: Gate, complete: Complete, tokenizer: TokenizerLike, limit: int | None = None
) -> GateResult:
    """Ask every question of `gate`, or an even sample of `limit` of them.

    complete  (prompt ids, most new tokens, stop) -> new ids, greedy; it ends after the first token
              for which stop(new ids so far) is true
    """

    def stop(ids: Sequence[int]) -> bool:
        done = tokenizer.eos_id in ids[-1:]
        return done or SENTENCE_END.search(tokenizer.decode(ids).lstrip()) is not None

    prompts = gate.prompts
    if limit is not None and limit < len(prompts):
        prompts = tuple(prompts[i * len(prompts) // limit] for i in range(limit))
    misses = []
    for prompt in prompts:
        new = complete(prompt.ids(tokenizer), gate.max_new, stop)
        text = tokenizer.decode([i for i in new if i != tokenizer.eos_id])
        if not prompt.accepts(text):
            misses.append(f"{prompt.text} -> {text.strip()!r}, expected {prompt.answer!r}")
    score = 1 - len(misses) / len(prompts)
    return GateResult(
        gate.name, gate.threshold, score, len(prompts), score >= gate.threshold, tuple(misses[:8])
    )


def format_results(results: Sequence[GateResult]) -> str:
    """The gate table as text."""
    lines = [f"{'gate':<12}{'needs':>8}{'score':>8}{'n':>6}  result"]
    for r in results:
        verdict = "pass" if r.passed else "FAIL"
        lines.append(f"{r.name:<12}{r.threshold:>8.3f}{r.score:>8.3f}{r.count:>6}  {verdict}")
    return "\n".join(lines)
