import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from dsv4.cli.main import build_parser
from dsv4.cli.model import load_model
from dsv4.cli.session import Session
from dsv4.cli.terminal import AnswerView, Terminal
from dsv4.core.errors import RequestError
from dsv4.core.sampling import SamplingParams
from dsv4.reference.model import ReferenceModel
from dsv4.text.tokenizer import Tokenizer

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def loaded(tiny):
    args = build_parser().parse_args(["generate", tiny, "--quiet"])
    return load_model(args, Terminal(quiet=True))


def greedy_ids(loaded, prompt, count):
    """Step by step without any of the session's code."""
    model, ids = loaded.runner, list(prompt)
    for _ in range(count):
        logits = model.forward(torch.tensor(ids), model.new_cache(), last_only=True)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


def test_text_is_the_greedy_continuation(dsv4, tiny, loaded):
    tokenizer = Tokenizer.open(tiny)
    expected = greedy_ids(loaded, tokenizer.encode_prompt(PROMPT), 10)
    assert tokenizer.eos_id not in expected
    code, out, err = dsv4("generate", tiny, "-p", PROMPT, "-n", "10", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["ids"] == expected
    assert report["text"] == tokenizer.decode(expected)
    assert report["schema"] == 1
    assert (report["finish_reason"], report["matched_stop"]) == ("length", None)
    assert report["prompt_ids"] == tokenizer.encode_prompt(PROMPT)
    assert report["stats"]["decode_tokens"] == 9
    assert "prefill 6 tok" in err
    assert "tier 1 float32" in err
    code, out, _ = dsv4("generate", tiny, "-p", PROMPT, "-n", "10", "--keep-control-chars")
    assert out == tokenizer.decode(expected) + "\n"


def test_tiers_agree(dsv4, tiny):
    command = ("generate", tiny, "-p", PROMPT, "-n", "12", "--json")
    reports = [json.loads(dsv4(*command, "--tier", tier)[1]) for tier in "01"]
    assert reports[0]["ids"] == reports[1]["ids"]
    assert [r["tier"] for r in reports] == [0, 1]


@pytest.mark.parametrize(
    "flag", [["--dtype", "bfloat16"], ["--keep-packed"], ["--simulate-kv-quant", "on"]]
)
def test_tier_0_refuses_what_it_cannot(dsv4, tiny, flag):
    assert dsv4("generate", tiny, "-p", "x", "--tier", "0", *flag)[0] == 2


def test_flags_reach_the_model(dsv4, tiny, monkeypatch):
    seen = {}
    real = ReferenceModel.__init__

    def spy(self, config, weights, dtype, simulate, keep_packed, device):
        seen.update(dtype=dtype, simulate=simulate, keep_packed=keep_packed, device=device)
        real(self, config, weights, dtype, simulate, keep_packed, device)

    monkeypatch.setattr(ReferenceModel, "__init__", spy)
    dsv4("generate", tiny, "-p", "x", "-n", "2", "--dtype", "bfloat16", "--keep-packed",
         "--simulate-kv-quant", "on")  # fmt: skip
    assert (seen["dtype"], seen["keep_packed"]) == (torch.bfloat16, True)
    assert seen["device"] == "cpu"
    assert seen["simulate"].kv
    assert seen["simulate"].indexer == "mxfp4"


@pytest.mark.parametrize("verb", ["generate", "chat", "dump"])
@pytest.mark.parametrize(
    ("device", "num_gpus", "code"),
    [("cuda", 0, 4), ("cuda:1", 0, 4), ("cuda:2", 2, 4), ("gpu", 0, 2), ("cuda:x", 0, 2),
     ("cuda:-1", 0, 2), ("cpu:1", 0, 2), ("", 0, 2), ("cuda:99999999999", 2, 4)],
)  # fmt: skip
def test_a_device_that_is_not_there(
    dsv4, tiny, tmp_path, monkeypatch, verb, device, num_gpus, code
):
    monkeypatch.setattr("dsv4.loader.Checkpoint.load", None)  # refused before the weights are read
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    flags = {"generate": ["-p", "x"], "dump": ["-p", "x", "--out", tmp_path / "x"], "chat": []}
    got, _, err = dsv4(verb, tiny, *flags[verb], "--device", device)
    assert got == code
    assert device in err
    fix = "use --device cuda, the first" if num_gpus else "use --device cpu"
    assert code == 2 or f"fix: {fix}" in err


def test_tier_0_runs_on_the_cpu(dsv4, tiny):
    code, _, err = dsv4("generate", tiny, "-p", "x", "--tier", "0", "--device", "cuda")
    assert code == 2
    assert "--device cuda" in err


def test_ids_are_made_on_the_device_of_the_model_and_chosen_from_on_the_cpu(loaded, monkeypatch):
    seen = []

    class Elsewhere:
        config, device = loaded.runner.config, torch.device("meta")

        def new_cache(self):
            return None

        def forward(self, ids, cache, last_only=False):
            seen.append((ids.device.type, ids.dtype))
            logits = torch.zeros(1, self.config.vocab_size)
            monkeypatch.setattr(torch.Tensor, "cpu", lambda x: seen.append("cpu") or x)
            return logits

    session = Session(Elsewhere(), loaded.tokenizer, loaded.stop_ids)
    list(session.generate([0, 5], SamplingParams(temperature=0.0, max_tokens=1), 4096))
    assert seen == [("meta", torch.int64), "cpu"]


def test_json_holds_no_raw_control_character(dsv4, tiny):
    text = "a\x9b2J\x7f\u202eGrüße"
    code, out, _ = dsv4("generate", tiny, "-p", text, "--print-prompt", "--json")
    assert code == 0
    assert json.loads(out)["prompt"].endswith(text)
    assert "Grüße" in out
    assert not set(out) & {"\x9b", "\x7f", "\u202e"}


def test_reasoning_and_text_are_parted_by_one_line_break(capsys):
    view = AnswerView(Terminal())
    for pieces in ([("reasoning", "so")], [("reasoning", " then")], [("text", "A"), ("text", "B")]):
        view.show(pieces)
    out, err = capsys.readouterr()
    assert (out, err) == ("AB", "so then\n")
    assert (view.reasoning, view.text) == ("so then", "AB")
    silent = AnswerView(Terminal(), silent=True)
    silent.show([("reasoning", "so"), ("text", "A")])
    assert (silent.reasoning, silent.text) == ("so", "A")
    assert capsys.readouterr() == ("", "")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_a_tokenizer_that_is_a_pipe_or_a_link_is_refused(dsv4, tiny, tmp_path, verb):
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    flags = ["-p", "x"] if verb == "generate" else []
    code, out, err = dsv4(verb, folder, *flags)
    assert code == 3
    assert "file_type" in out + err
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/dev/zero")
    code, out, err = dsv4(verb, folder, *flags)
    assert code == 3
    assert "outside the folder" in out + err


def test_a_generation_config_that_leads_nowhere_is_no_absent_one(dsv4, tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").symlink_to("absent")
    code, _, err = dsv4("generate", tmp_path / "m", "-p", "x", "-n", "1")
    assert code == 3
    assert "generation_config.json" in err


def test_think_says_which_release_its_words_are_of(dsv4):
    for verb in ("generate", "chat"):
        assert "2026-07-31 release" in " ".join(dsv4(verb, "--help")[1].split())


def test_prompt_sources(dsv4, tiny, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Grüße", "utf-8")
    outputs = []
    for flags in (
        ["-p", "Grüße"], ["-f", tmp_path / "prompt.txt"], ["-f", "-"], ["-"], ["-n", "5", "-"],
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stdin", io.StringIO("Grüße"))
        outputs.append(dsv4("generate", tiny, *flags, "--print-prompt")[1])
    assert len(set(outputs)) == 1


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        ("Hi", "Hi"),
        ("Hi\n", "Hi"),
        ("Hi\r\n", "Hi"),
        ("Hi\n\n", "Hi\n"),
        ("Hi\n ", "Hi\n "),
        ("\n", ""),
    ],
)
def test_one_final_newline_of_a_file_is_not_of_the_prompt(
    dsv4, tiny, tmp_path, monkeypatch, written, prompt
):
    words = ("generate", tiny, "--print-prompt")
    wanted = dsv4(*words, "-p", prompt)[1]
    (tmp_path / "prompt").write_bytes(written.encode())
    assert dsv4(*words, "-f", tmp_path / "prompt")[1] == wanted
    for newline in (None, ""):  # with and without line ends made one
        stdin = io.TextIOWrapper(io.BytesIO(written.encode()), newline=newline)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert dsv4(*words, "-")[1] == wanted
    assert dsv4(*words, "-p", f"{prompt}\n")[1] != wanted


def test_a_dash_may_be_a_prompt(dsv4, tiny):
    report = json.loads(dsv4("generate", tiny, "-p", "-", "--print-prompt", "--json")[1])
    assert report["prompt"].endswith("-")


@pytest.mark.parametrize("flags", [[], ["-p", "a", "-f", "b"], ["-p", "a", "-"], ["-", "-"]])
def test_exactly_one_prompt(dsv4, tiny, flags):
    code, _, err = dsv4("generate", tiny, *flags)
    assert code == 2
    assert "one of -p TEXT" in err


def test_prompt_that_is_not_utf8(dsv4, tiny, tmp_path):
    (tmp_path / "latin1").write_bytes("Grüße".encode("latin-1"))
    code, _, err = dsv4("generate", tiny, "-f", tmp_path / "latin1")
    assert code == 2
    assert "UTF-8" in err


def test_print_prompt_loads_no_weights(dsv4, tiny, monkeypatch):
    monkeypatch.setattr("dsv4.loader.Checkpoint.load", None)
    tokenizer = Tokenizer.open(tiny)
    code, out, _ = dsv4("generate", tiny, "-p", "Hello<think>", "--print-prompt", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["prompt"] == "<｜begin▁of▁sentence｜>Hello<think>"
    assert report["ids"] == [0, *tokenizer.encode("Hello<think>")]


@pytest.mark.parametrize(
    ("flags", "tail"),
    [
        (["--chat"], "<｜User｜>Hello<｜Assistant｜></think>"),
        (["--think", "off"], "<｜User｜>Hello<｜Assistant｜></think>"),
        (["--think", "low"], "<｜User｜>Hello<｜Assistant｜><think>"),
        (["--think", "low", "--system", "Be brief."],
         "Be brief.<｜User｜>Hello<｜Assistant｜><think>"),
    ],
)  # fmt: skip
def test_chat_prompts(dsv4, tiny, flags, tail):
    out = dsv4("generate", tiny, "-p", "Hello", "--print-prompt", "--json", *flags)[1]
    assert json.loads(out)["prompt"] == f"<｜begin▁of▁sentence｜>{tail}"


@pytest.mark.parametrize("flags", [["--raw", "--chat"], ["--system", "x"], ["--raw", "--think",
                         "low"]])  # fmt: skip
def test_contradicting_prompt_flags(dsv4, tiny, flags):
    assert dsv4("generate", tiny, "-p", "x", *flags)[0] == 2


def test_expect_passes_and_fails(dsv4, tiny):
    text = json.loads(dsv4("generate", tiny, "-p", PROMPT, "-n", "8", "--json")[1])["text"]
    part = text[2:5]
    code, out, _ = dsv4("generate", tiny, "-p", PROMPT, "-n", "8", "--expect", part)
    assert code == 0
    assert out.endswith(f"PASS: {PROMPT!r} -> {text!r}\n")
    code, out, _ = dsv4("generate", tiny, "-p", PROMPT, "-n", "8", "--expect", "Paris")
    assert code == 1
    assert f"FAIL: {PROMPT!r} -> " in out
    code, out, err = dsv4("generate", tiny, "-p", PROMPT, "--json", "--expect", "Paris")
    assert code == 1
    assert json.loads(out)["text"]
    assert "FAIL" in err


def test_stop_string_and_stop_id(dsv4, tiny):
    plain = json.loads(dsv4("generate", tiny, "-p", PROMPT, "-n", "10", "--json")[1])
    stop = plain["text"][6:9]
    at = plain["text"].index(stop)
    report = json.loads(dsv4("generate", tiny, "-p", PROMPT, "--json", "--stop", stop)[1])
    assert report["text"] == plain["text"][:at]
    assert (report["finish_reason"], report["matched_stop"]) == ("stop", stop)
    third = plain["ids"][2]
    report = json.loads(dsv4("generate", tiny, "-p", PROMPT, "--json", "--stop-id", str(third))[1])
    assert report["ids"] == plain["ids"][: plain["ids"].index(third) + 1]
    assert report["matched_stop"] == third


def test_generation_config_adds_stop_ids(dsv4, tiny, tmp_path):
    import shutil

    plain = json.loads(dsv4("generate", tiny, "-p", PROMPT, "-n", "10", "--json")[1])
    shutil.copytree(tiny, tmp_path / "m")
    config = tmp_path / "m" / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": [1, plain["ids"][3]]}))
    report = json.loads(dsv4("generate", tmp_path / "m", "-p", PROMPT, "--json")[1])
    assert report["ids"] == plain["ids"][:4]
    config.write_text('{"eos_token_id": "x"}')
    assert dsv4("generate", tmp_path / "m", "-p", PROMPT)[0] == 3


def test_seed_repeats_a_sample(dsv4, tiny):
    def ids(seed, temp="1"):
        command = ("generate", tiny, "-p", PROMPT, "-n", "16", "--temp", temp, "--json")
        return json.loads(dsv4(*command, "--seed", seed)[1])["ids"]

    assert ids("1") == ids("1") != ids("2")
    assert ids("1", "0") == ids("2", "0")


@pytest.mark.parametrize(
    "flags", [["--temp", "-1"], ["--top-p", "0"], ["--min-p", "2"], ["-n", "0"], ["--seed", "-1"],
              ["--stop", ""], ["--threads", "0"], ["--max-context", "0"], ["--threads", "9" * 30],
              ["--temp", "1e400"]],
)  # fmt: skip
def test_bad_parameters_are_usage_errors(dsv4, tiny, flags):
    code, _, err = dsv4("generate", tiny, "-p", "x", *flags)
    assert code == 2
    assert err.startswith("error: ")


def test_logprobs_file(dsv4, tiny, tmp_path):
    path = tmp_path / "lp.jsonl"
    command = ("generate", tiny, "-p", PROMPT, "-n", "5", "--json", "--logprobs", path)
    report = json.loads(dsv4(*command)[1])
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [r["id"] for r in rows] == report["ids"]
    assert [r["position"] for r in rows] == list(range(6, 11))
    for row in rows:
        assert row["top"][0] == [row["id"], row["logprob"]]  # greedy
        assert sum(2.718281828**v for _, v in row["top"]) < 1
        assert len(row["top"]) == 10


def test_max_context(dsv4, tiny):
    code, _, err = dsv4("generate", tiny, "-p", PROMPT, "--max-context", "5")
    assert code == 2
    assert "prompt: expected 1 to 5 tokens, got 6" in err
    _, out, err = dsv4("generate", tiny, "-p", PROMPT, "--max-context", "9", "--json")
    report = json.loads(out)
    assert "the context of 9 tokens is full: shorten the prompt, or raise --max-context\n" in err
    assert (len(report["ids"]), report["finish_reason"]) == (3, "length")
    report = json.loads(dsv4("generate", tiny, "-p", PROMPT, "--max-context", "6", "--json")[1])
    assert (report["ids"], report["finish_reason"]) == ([], "length")


def test_quiet_leaves_stderr_empty(dsv4, tiny):
    code, out, err = dsv4("generate", tiny, "-p", PROMPT, "-n", "3", "--quiet")
    assert (code, err) == (0, "")
    assert out.endswith("\n")


def test_reasoning_goes_to_stderr(dsv4, tiny):
    command = ("generate", tiny, "-p", "x", "--think", "low", "-n", "6")
    report = json.loads(dsv4(*command, "--json")[1])
    assert report["reasoning"]
    assert report["text"] == ""
    code, out, err = dsv4(*command)
    assert (code, out) == (0, "\n")
    assert report["reasoning"][:1] in err


def test_control_characters_are_stripped(capsys):
    Terminal().data("a\x1b[31mb", end="")
    terminal = Terminal()
    terminal.keep_control = True
    terminal.data("a\x1b[31mb", end="")
    assert capsys.readouterr().out == "a[31mb" + "a\x1b[31mb"


@pytest.mark.parametrize("name", ["absent", "README.md", "./nano"])
def test_a_model_that_is_no_folder(dsv4, name):
    code, _, err = dsv4("generate", name, "-p", "x")
    assert code == 3
    assert "fix:" in err


def test_foreign_tokenizer_is_refused(dsv4, tiny, tmp_path):
    import shutil

    from dsv4.testing.tokenizer import write_tokenizer

    shutil.copytree(tiny, tmp_path / "m")
    corpus = [" ".join(str(n * n) for n in range(2000))]
    write_tokenizer(tmp_path / "m", vocab_size=700, corpus=corpus)
    code, _, err = dsv4("generate", tmp_path / "m", "-p", "x")
    assert code == 3
    assert "at most 512 ids" in err
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2}))
    assert "end of sentence 2" in dsv4("generate", tmp_path / "m", "-p", "x")[2]


def test_session_continues_what_the_cache_holds(loaded):
    session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    first = [0, *loaded.tokenizer.encode(PROMPT)]
    answer = [s.token_id for s in session.generate(first, params, 4096)]
    assert session.stats.prefill_tokens == len(first)
    longer = [*first, *answer, *loaded.tokenizer.encode(" Hello")]
    again = [s.token_id for s in session.generate(longer, params, 4096)]
    # the last token of the answer had not been fed
    assert session.stats.prefill_tokens == len(longer) - len(first) - len(answer) + 1
    assert again == greedy_ids(loaded, longer, 4)
    other = [0, *loaded.tokenizer.encode("A needle in a haystack is hard to find, but the " * 2)]
    assert len(other) > len(longer) + 3
    assert [s.token_id for s in session.generate(other, params, 4096)] == greedy_ids(
        loaded, other, 4
    )
    assert session.stats.prefill_tokens == len(other)


def test_prefill_in_chunks_gives_the_same_answer(loaded, monkeypatch):
    prompt = [0, *loaded.tokenizer.encode("The needle is in the haystack. " * 30)]
    params = SamplingParams(temperature=0.0, max_tokens=4)
    answers = []
    for chunk in (7, 10_000):
        monkeypatch.setattr("dsv4.cli.session.PREFILL_CHUNK", chunk)
        session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
        answers.append([s.token_id for s in session.generate(prompt, params, 4096)])
    assert answers[0] == answers[1]


def test_a_failed_step_forgets_the_cache(loaded):
    session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
    params = SamplingParams(temperature=0.0, max_tokens=2)
    prompt = [0, *loaded.tokenizer.encode(PROMPT)]
    answer = [s.token_id for s in session.generate(prompt, params, 4096)]
    longer = [*prompt, *answer, 5]
    with pytest.raises(RequestError, match="ids"):
        list(session.generate([*longer, 99999], params, 4096))
    list(session.generate(longer, params, 4096))
    assert session.stats.prefill_tokens == len(longer)


def test_ctrl_c_prints_what_there_is_and_a_second_one_quits(tiny):
    command = [sys.executable, "-u", "-m", "dsv4", "generate", tiny, "-p", PROMPT, "-n", "4000",
               "--ignore-eos"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first + out
    decoded = re.search(rb"decode (\d+) tok", err)  # the statistics still come
    assert int(decoded[1]) < 3000
    assert b"Traceback" not in err


def test_interrupt_during_prefill(loaded):
    session = Session(loaded.runner, loaded.tokenizer, loaded.stop_ids)
    prompt = [0] * 2000
    with session.interrupt.watch():
        signal.raise_signal(signal.SIGINT)
        steps = list(session.generate(prompt, SamplingParams(), 4096))
        assert steps == []
        assert session.stats.prefill_tokens == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
