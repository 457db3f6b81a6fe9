import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Rust

from dsv4.core.errors import CheckpointError, RequestError
from dsv4.text.special import BOS, EOS
from dsv4.text.tokenizer import MAX_FILE_BYTES, Tokenizer

OFFICIAL_IDS = {
    BOS: 0, EOS: 1, "<｜▁pad▁｜>": 2, "<｜fim▁hole｜>": 128800, "<｜fim▁begin｜>": 128801,
    "<｜fim▁end｜>": 128802, "<｜User｜>": 128803, "<｜Assistant｜>": 128804, "<|EOT|>": 128805,
    "<think>": 128821, "</think>": 128822, "｜DSML｜": 128825, "<｜latest_reminder｜>": 128828,
    "<｜action｜>": 128829, "<｜query｜>": 128830, "<｜authority｜>": 128831,
    "<｜domain｜>": 128832,
    "<｜title｜>": 128836, "<｜read_url｜>": 128845, "<｜image｜>": 129279,
}  # fmt: skip
TEXTS = (
    "", " ", "\n", "The capital of France is", "  leading and trailing  ", "a\r\n\r\n  b\t\tc",
    "1234567890 3.14159 1,000,000", "naïve Grüße Ελλάδα Привет", "日本語のテキストと中文文本。",
    "🙂👩‍👩‍👧‍👦 🇫🇷",
    "def f(x):\n    return {'a': [x, -1]}  # c", "｜ ▁ <｜ ｜> <| |> < think > </ think>",
    "\x00\x1b[31m\x7f",
    "<th", "ink>", "e\u0301 \u200d\u202e", "'s 't I'll don't", "x" * 3000,
)  # fmt: skip


@pytest.fixture(scope="module")
def rust(official_folder) -> Rust:
    return Rust.from_file(str(official_folder / "tokenizer.json"))


def test_official_control_tokens_have_their_ids(official):
    assert {s: official.control_id(s) for s in OFFICIAL_IDS} == OFFICIAL_IDS
    assert (official.bos_id, official.eos_id, official.vocab_size) == (0, 1, 129280)
    assert len(official.control_ids) == 1283


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_the_full_tokenizer_on_ordinary_text(official, rust, text):
    assert official.encode(text) == rust.encode(text, add_special_tokens=False).ids
    assert official.decode(official.encode(text)) == text


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_encode_equals_the_full_tokenizer_on_any_text(official, rust, text):
    ids = rust.encode(text, add_special_tokens=False).ids
    got = official.encode(text)
    assert official.decode(got) == text
    assert not official.control_ids.intersection(got)
    if not official.control_ids.intersection(ids):
        assert got == ids


def test_no_control_spelling_encodes_to_a_control_id(official, rust):
    for spelling in official.control_spellings:
        for text in (spelling, f"a{spelling}b", f" {spelling}\n", spelling * 2):
            assert not official.control_ids.intersection(official.encode(text)), spelling
            assert official.decode(official.encode(text)) == text
    # the test would notice: the full tokenizer does turn these spellings into control ids
    assert rust.encode("<｜User｜>").ids == [128803]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_split_and_nested_spellings_stay_text(official, data):
    pieces = st.sampled_from(official.control_spellings)
    a, b = data.draw(pieces), data.draw(pieces)
    cut = data.draw(st.integers(0, len(a)))
    text = a[:cut] + data.draw(st.sampled_from(["", b, " ", "\u200b", "\x00"])) + a[cut:]
    assert not official.control_ids.intersection(official.encode(text))
    assert official.decode(official.encode(text)) == text


def test_control_tokens_in_the_base_vocabulary_stay_unreachable(small_folder, tmp_path):
    raw = json.loads((small_folder / "tokenizer.json").read_text("utf-8"))
    raw["model"]["ignore_merges"] = True
    raw["model"]["vocab"]["think"] = 9000
    raw["added_tokens"].append({"id": 9000, "content": "think", "special": False})
    tokenizer = Tokenizer(raw)
    assert tokenizer.control_id("think") == 9000
    assert 9000 not in tokenizer.encode("think")
    assert 9000 not in tokenizer.encode("<think>")


def test_prompt_of_a_raw_completion_is_bos_and_text(official):
    ids = official.encode_prompt("The capital of France is")
    assert ids == [0, 671, 6102, 294, 8760, 344]
    assert official.decode(ids) == BOS + "The capital of France is"


def test_dsml_example(official):
    text, ids = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n', []
    for n, plain in enumerate(text.split("｜DSML｜")):
        ids += [official.control_id("｜DSML｜")] * (n > 0) + official.encode(plain)
    expected = "271 30 128825 72461 4941 12548 1018 30 128825 40148 5406 2329 1281 72 3816"
    assert ids == [int(x) for x in expected.split()]


def test_decode_equals_the_full_tokenizer(official, rust):
    assert all(
        official.decode([i]) == rust.decode([i], skip_special_tokens=False) for i in range(129280)
    )


def test_an_id_that_the_file_lacks_decodes_to_one_replacement_character(small):
    assert small.decode([small.vocab_size, 10**9, -1]) == "\ufffd" * 3


def test_lone_surrogate_is_a_request_error(small):
    with pytest.raises(RequestError, match="lone surrogate at character 2"):
        small.encode("ab\ud800")


def test_unknown_control_token_is_named(small):
    with pytest.raises(RequestError, match="<｜nope｜>"):
        small.control_id("<｜nope｜>")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError) as e:
        Tokenizer.open(tmp_path)
    assert e.value.kind == "missing_file"
    assert e.value.file == "tokenizer.json"
    assert e.value.fix


@pytest.mark.timeout(20)
def test_what_is_no_plain_file_of_the_folder_is_not_read(small_folder, tmp_path):
    """A pipe would hang, /dev/zero would never end, a link could show another user's file."""
    path = tmp_path / "tokenizer.json"
    for target in (small_folder / "tokenizer.json", "/dev/zero"):
        path.symlink_to(target)
        with pytest.raises(CheckpointError) as e:
            Tokenizer.open(tmp_path)
        assert (e.value.kind, e.value.file) == ("path", "tokenizer.json")
        path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError) as e:
        Tokenizer.open(tmp_path)
    assert e.value.kind == "file_type"


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(CheckpointError) as e:
        Tokenizer.open(tmp_path)
    assert e.value.kind == "too_large"


def test_a_key_given_twice_is_refused(small_folder, tmp_path):
    text = (small_folder / "tokenizer.json").read_text("utf-8")
    (tmp_path / "tokenizer.json").write_text('{"model": {}, ' + text.lstrip()[1:], "utf-8")
    with pytest.raises(CheckpointError) as e:
        Tokenizer.open(tmp_path)
    assert e.value.kind == "duplicate"


BREAK = {
    "'added_tokens', got list": lambda raw: [],
    "'added_tokens', got dict": lambda raw: {k: v for k, v in raw.items() if k != "added_tokens"},
    "'BPE'": lambda raw: raw | {"model": {"type": "WordPiece"}},
    "'vocab' and 'merges'": lambda raw: raw | {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "ByteLevel decoder": lambda raw: raw | {"decoder": None},
    "non-empty 'content'": lambda raw: raw | {"added_tokens": [{"id": 1}]},
    "non-negative id": lambda raw: raw | {"added_tokens": [{"id": "1", "content": "x"}]},
    "begin▁of▁sentence": lambda raw: raw | {"added_tokens": []},
    "one id for": lambda raw: raw | {
        "added_tokens": [*raw["added_tokens"], {"id": 700, "content": BOS}]
    },
    "used twice": lambda raw: raw | {
        "added_tokens": [*raw["added_tokens"], {"id": 0, "content": "new"}]
    },
    "one token each": lambda raw: raw | {
        "added_tokens": [*raw["added_tokens"], {"id": 100, "content": "new"}]
    },
    "byte-level tokens": lambda raw: raw | {
        "model": raw["model"] | {"vocab": raw["model"]["vocab"] | {"日": 800}}
    },
    "tokenizers can load": lambda raw: raw | {"model": raw["model"] | {"merges": [["q", "zz"]]}},
}  # fmt: skip


@pytest.mark.parametrize("case", BREAK)
def test_broken_files_are_checkpoint_errors(small_folder, tmp_path, case):
    raw = json.loads((small_folder / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(BREAK[case](raw)), "utf-8")
    with pytest.raises(CheckpointError) as e:
        Tokenizer.open(tmp_path)
    assert e.value.kind == "tokenizer"
    assert e.value.file == "tokenizer.json"
    assert case in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\ufeff{}", '{"a": NaN'])
def test_broken_json_is_a_checkpoint_error(tmp_path, text):
    Path(tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(CheckpointError):
        Tokenizer.open(tmp_path)


def test_binary_file_is_a_checkpoint_error(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(bytes(range(256)))
    with pytest.raises(CheckpointError, match="utf-8"):
        Tokenizer.open(tmp_path)
