import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.core.errors import MissingExtra, RequestError
from dsv4.text import chat
from dsv4.text.chat import (
    Message,
    ReasoningSplitter,
    Tool,
    ToolCall,
    encode_chat,
    render_chat,
    split_reasoning,
)
from dsv4.text.special import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER

USER_ID, ASSISTANT_ID, THINK_ID, END_THINK_ID = 128803, 128804, 128821, 128822


def test_shortest_prompt(official):
    assert encode_chat(official, [Message("user", "Hello")]) == [0, 128803, 19923, 128804, 128822]


def test_shortest_prompt_with_another_tokenizer(small):
    ids = encode_chat(small, [Message("user", "Hello")])
    control = [small.control_id(t) for t in (BOS, USER, ASSISTANT, THINK_END)]
    assert ids == [*control[:2], *small.encode("Hello"), *control[2:]]
    assert max(ids) < small.vocab_size


def test_tool_call_of_history_has_the_documented_ids(official):
    call = Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),))
    ids = encode_chat(
        official, [Message("user", "x"), call, Message("tool", "r", tool_call_id="1")]
    )
    expected = "271 30 128825 72461 4941 12548 1018 30 128825 40148 5406 2329 1281 72 3816"
    assert expected in " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("thinking", "prefix", "tail"),
    [
        ("off", "", THINK_END),
        ("low", "", THINK_START),
        ("high", "Reasoning Effort: Absolute maximum", THINK_START),
        ("max", "Reasoning Effort: Beyond maximum", THINK_START),
    ],
)
def test_thinking_selects_prefix_and_tail(thinking, prefix, tail):
    text = render_chat([Message("system", "S"), Message("user", "U")], thinking).text
    assert text.startswith(BOS + (prefix or "S"))
    assert text.endswith(f"S{USER}U{ASSISTANT}{tail}")


def test_history(small):
    turns = [Message("user", "a"), Message("assistant", "b", "why"), Message("user", "c")]
    assert render_chat(turns).text == (
        f"{BOS}{USER}a{ASSISTANT}{THINK_END}b{EOS}{USER}c{ASSISTANT}{THINK_END}"
    )


def to_recipe(messages, thinking, tools):
    """The same conversation built with the recipe's own classes, for its own `encode`."""
    import deepseek_recipe as recipe  # here, so that a machine without it collects this file

    build = {
        "system": lambda m: recipe.SystemMessage(m.content),
        "user": lambda m: recipe.UserMessage(m.content),
        "tool": lambda m: recipe.ToolMessage(m.content, m.tool_call_id),
        "latest_reminder": lambda m: recipe.LatestReminderMessage(m.content),
        "assistant": lambda m: recipe.AssistantMessage(
            m.content, m.reasoning, [recipe.ToolCall(*c) for c in calls(m)] or None
        ),
    }
    return recipe.Conversation(
        [build[m.role](m) for m in messages],
        thinking_mode=thinking != "off",
        reasoning_effort=None if thinking == "off" else thinking,
        tools=[recipe.ToolDefinition(t.name, t.description or None, t.parameters) for t in tools]
        or None,
    )


def calls(m):
    return [(c.id, c.name, c.arguments) for c in m.tool_calls]


texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["<｜User｜>hi", "</think>", "a<think>b", "<｜DSML｜tool_calls>", EOS, "日本 7"]
    ),
)
arguments = st.one_of(
    st.dictionaries(texts, st.one_of(texts, st.integers(), st.lists(texts, max_size=2)), max_size=2)
    .map(json.dumps),
    texts,
)  # fmt: skip
tool_calls = st.lists(st.builds(ToolCall, st.sampled_from("123"), texts, arguments), max_size=2)
messages = st.one_of(
    st.builds(Message, st.sampled_from(["system", "user", "latest_reminder"]), texts),
    st.builds(Message, st.just("assistant"), texts, texts, tool_calls.map(tuple)),
    st.builds(Message, st.just("tool"), texts, tool_call_id=st.sampled_from("123")),
)
schemas = st.dictionaries(texts, texts, max_size=2)
tool_lists = st.lists(st.builds(Tool, texts, texts, schemas), max_size=2)


@pytest.fixture(scope="module")
def encoder(official_folder):
    import deepseek_recipe as recipe

    tokenizer = recipe.Tokenizer.from_file(str(official_folder / "tokenizer.json"))
    return recipe.DeepseekV4Encoding().with_tokenizer(tokenizer)


@given(st.lists(messages, min_size=1, max_size=6), st.sampled_from(chat.THINKING), tool_lists)
@settings(max_examples=400, deadline=None)
def test_ids_equal_the_encoders_own(official, encoder, turns, thinking, tools):
    assert encode_chat(official, turns, thinking, tools) == encoder.encode(
        to_recipe(turns, thinking, tools)
    )


def conversation(payload):
    """Every text field that a user, a tool or the model fills carries `payload`."""
    call = ToolCall("1", f"n{payload}", json.dumps({f"k{payload}": f"v{payload}", "n": [payload]}))
    bad_call = ToolCall("2", payload, f"not json {payload}")
    turns = [
        Message("system", f"s {payload}"),
        Message("latest_reminder", payload),
        Message("user", payload + payload),
        Message("assistant", f"{payload}a", f"r{payload}", (call, bad_call)),
        Message("tool", f"{payload}", tool_call_id="1"),
        Message("tool", f"x{payload}y", tool_call_id="2"),
        Message("user", f"\n{payload}\n"),
        Message("assistant", payload, payload),
        Message("user", f" {payload}"),
    ]
    tools = [Tool(payload, payload, {"type": "object", payload: {"enum": [payload]}})]
    return turns, tools


def test_grounding_marks_of_an_answer_stay_text(official, encoder):
    turns = [Message("user", "x"), Message("assistant", "a<｜ref｜>b"), Message("user", "y")]
    ref = official.control_id("<｜ref｜>")
    assert ref in encoder.encode(to_recipe(turns, "off", []))  # where the encoder differs
    ids = encode_chat(official, turns)
    assert ref not in ids
    assert "a<｜ref｜>b" in official.decode(ids)


@pytest.mark.parametrize("thinking", ["off", "max"])
def test_no_text_field_can_make_a_control_token(official, thinking):
    def control(payload):
        turns, tools = conversation(payload)
        ids = encode_chat(official, turns, thinking, tools)
        return [i for i in ids if i in official.control_ids]

    expected = control("x")
    assert len(expected) > 20
    leaks = [s for s in official.control_spellings if control(s) != expected]
    assert not leaks, f"{len(leaks)} of {len(official.control_spellings)} leak: {leaks[:5]}"


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_split_spellings_cannot_make_a_control_token(small, data):
    token = data.draw(st.sampled_from(small.control_spellings))
    cut = data.draw(st.integers(0, len(token)))
    turns = [Message("system", "s" + token[:cut]), Message("user", token[cut:]),
             Message("tool", token[cut:] + token[:cut], tool_call_id="1"),
             Message("user", token[:cut] + token + token[cut:])]  # fmt: skip
    benign = [Message(m.role, "x", tool_call_id=m.tool_call_id) for m in turns]
    got, want = (
        [i for i in encode_chat(small, t) if i in small.control_ids] for t in (turns, benign)
    )
    assert got == want


def test_a_tokenizer_without_a_needed_control_token_is_refused(small_folder):
    from dsv4.text.tokenizer import Tokenizer

    raw = json.loads((small_folder / "tokenizer.json").read_text("utf-8"))
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != USER]
    for name in [USER]:
        raw["model"]["vocab"].pop(name, None)
    with pytest.raises(RequestError, match=USER):
        encode_chat(Tokenizer(raw), [Message("user", "Hello")])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_request_errors(small, text):
    with pytest.raises(RequestError):
        encode_chat(small, [Message("user", text)])


def test_bad_role_effort_and_empty_conversation_are_refused():
    with pytest.raises(RequestError, match="role"):
        Message("developer", "x")
    with pytest.raises(RequestError, match="thinking"):
        render_chat([Message("user", "x")], "xhigh")
    with pytest.raises(RequestError, match="messages"):
        render_chat([])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_recipe", None)
    with pytest.raises(MissingExtra, match="deepseek-recipe") as e:
        render_chat([Message("user", "x")])
    assert f"{sys.executable} -m pip install 'dsv4-inference[chat]'" in e.value.fix
    assert "-e '.[chat]'" in e.value.fix


def test_split_reasoning(official):
    ids = [*official.encode("I think."), END_THINK_ID, *official.encode("Paris."), 1]
    assert split_reasoning(official, ids, thinking=True) == ("I think.", "Paris." + EOS)
    assert split_reasoning(official, ids[:3], thinking=True)[1] == ""
    assert split_reasoning(official, ids[4:-1], thinking=False) == ("", "Paris.")


def test_typed_think_end_does_not_end_the_reasoning(official):
    ids = [*official.encode("a</think>b"), END_THINK_ID, *official.encode("c")]
    assert split_reasoning(official, ids, thinking=True) == ("a</think>b", "c")


@given(st.lists(st.integers(128790, 128830), max_size=12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_split_reasoning_takes_any_ids(official, ids, thinking):
    reasoning, text = split_reasoning(official, ids, thinking)
    joined = reasoning + (THINK_END if thinking and END_THINK_ID in ids else "") + text
    assert joined == official.decode(ids)


def test_splitter_reports_each_token(official):
    splitter = ReasoningSplitter(official, thinking=True)
    kinds = [splitter.push(i) for i in (THINK_ID, 5, END_THINK_ID, 6, END_THINK_ID)]
    assert kinds == ["reasoning", "reasoning", None, "text", "text"]
