"""Conversations to prompt ids, and the ids of an answer to reasoning and text.

DeepSeek's own encoder (deepseek-recipe, extra `chat`) writes the prompt and says which ranges of it
are control tokens; those become ids by their spelling, everything between them is encoded as plain
text. So any tokenizer with the same spellings works, and nothing a user, a tool or an earlier
answer says can become a control token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsv4.core.errors import MissingExtra, RequestError
from dsv4.text.special import STRUCTURE, THINK_END
from dsv4.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "latest_reminder")
THINKING = ("off", "low", "high", "max")
THINKING_HELP = (
    "as the 2026-07-31 release encodes it: high and max each put a text of their own in front; "
    "preview weights know the text of high as max"
)


@dataclass(frozen=True)
class ToolCall:
    """A call that an earlier answer made; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A function the model may call; `parameters` is its JSON schema."""

    name: str
    description: str = ""
    parameters: Any = None


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role          one of ROLES
    content       its text
    reasoning     of an assistant turn; the encoder drops it where the model expects none
    tool_calls    of an assistant turn
    tool_call_id  of a tool turn: the call it answers
    """

    role: str
    content: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise RequestError("role", f"one of {ROLES}", self.role)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as text, cut into plain text and control tokens.

    parts  (is_control, text) in order; their texts join to the prompt
    """

    parts: tuple[tuple[bool, str], ...]

    @property
    def text(self) -> str:
        """The prompt as one string, for people: which of it is control tokens is lost."""
        return "".join(text for _, text in self.parts)

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """The ids. Raises RequestError when the tokenizer lacks a control token that is used."""
        ids: list[int] = []
        for is_control, text in self.parts:
            ids += [tokenizer.control_id(text)] if is_control else tokenizer.encode(text)
        return ids


def render_chat(
    messages: Sequence[Message], thinking: str = "off", tools: Sequence[Tool] = ()
) -> RenderedPrompt:
    """Write the prompt that asks for the next assistant turn of `messages`.

    thinking  "off" opens the answer behind `</think>`; "low", "high" and "max" open it with
              `<think>`, and "high" and "max" put DeepSeek's effort text in front

    Raises MissingExtra without deepseek-recipe, RequestError for a conversation it refuses.
    """
    if thinking not in THINKING:
        raise RequestError("thinking", f"one of {THINKING}", thinking)
    if not messages:
        raise RequestError("messages", "at least one message", messages)
    recipe = _recipe()
    try:
        rendered = recipe.DeepseekV4Encoding().render_conversation(
            recipe.Conversation(
                [_message(recipe, m) for m in messages],
                thinking_mode=thinking != "off",
                reasoning_effort=None if thinking == "off" else thinking,
                tools=[_tool(recipe, t) for t in tools] or None,
            )
        )
    except (ValueError, RuntimeError, TypeError) as e:  # UnicodeEncodeError is a ValueError
        raise RequestError(
            "messages", "a conversation that can be encoded", str(e)[:200], "correct the message"
        ) from e
    return RenderedPrompt(tuple(_parts(rendered.prompt, rendered.special_ranges)))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: str = "off",
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Prompt ids of `messages`; see render_chat."""
    return render_chat(messages, thinking, tools).encode(tokenizer)


class ReasoningSplitter:
    """Sorts the ids of an answer into reasoning and text.

    The prompt of a thinking answer ends with `<think>`, so the answer begins inside the reasoning;
    the control token `</think>` ends it. The same characters typed as ordinary text do not.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool) -> None:
        self._end = tokenizer.control_id(THINK_END) if thinking else -1
        self.in_reasoning = thinking

    def push(self, token_id: int) -> str | None:
        """Say what `token_id` is part of: "reasoning", "text", or None for the end of reasoning."""
        if self.in_reasoning and token_id == self._end:
            self.in_reasoning = False
            return None
        return "reasoning" if self.in_reasoning else "text"


def split_reasoning(tokenizer: Tokenizer, ids: Sequence[int], thinking: bool) -> tuple[str, str]:
    """Cut a whole answer into (reasoning, text); text is "" while the reasoning has no end."""
    splitter = ReasoningSplitter(tokenizer, thinking)
    parts: dict[str | None, list[int]] = {"reasoning": [], "text": [], None: []}
    for token_id in ids:
        parts[splitter.push(token_id)].append(token_id)
    return tokenizer.decode(parts["reasoning"]), tokenizer.decode(parts["text"])


def _recipe() -> Any:
    try:
        import deepseek_recipe
    except ImportError as e:
        raise MissingExtra("deepseek-recipe", "chat") from e
    return deepseek_recipe


def _message(recipe: Any, m: Message) -> Any:
    if m.role == "system":
        return recipe.SystemMessage(m.content)
    if m.role == "user":
        return recipe.UserMessage(m.content)
    if m.role == "tool":
        return recipe.ToolMessage(m.content, m.tool_call_id)
    if m.role == "latest_reminder":
        return recipe.LatestReminderMessage(m.content)
    calls = [recipe.ToolCall(c.id, c.name, c.arguments) for c in m.tool_calls]
    return recipe.AssistantMessage(m.content, m.reasoning, calls or None)


def _tool(recipe: Any, t: Tool) -> Any:
    return recipe.ToolDefinition(t.name, t.description or None, t.parameters)


def _parts(prompt: str, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[bool, str]]:
    """Cut `prompt` at the control tokens.

    The encoder also makes tokens of the grounding marks (ref, box, point, polygon) that an earlier
    answer wrote. Here those stay text: the text model does not use them, and answers in a history
    come from outside.
    """
    at = 0
    for start, end in ranges:
        if prompt[start:end] not in STRUCTURE:
            continue
        if at < start:
            yield False, prompt[at:start]
        yield True, prompt[start:end]
        at = end
    if at < len(prompt):
        yield False, prompt[at:]
