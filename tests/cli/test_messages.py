"""What the command line says when something is missing, too large or mistyped."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4.cli import main as cli
from dsv4.cli.dump import _forward
from dsv4.core import env
from dsv4.core.errors import RequestError
from dsv4.reference.model import ReferenceModel


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


class Bytes(io.TextIOWrapper):
    """stdin that holds these bytes and says they are in the encoding of a C locale."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), "ascii", "surrogateescape")


def test_dump_makes_its_ids_on_the_device_of_the_model():
    seen = []

    class Elsewhere(ReferenceModel):
        def __init__(self):
            self.device, self.mtp = torch.device("meta"), [None]

        def new_cache(self):
            return None

        def forward_streams(self, ids, cache):
            seen.append(ids.device.type)
            return torch.zeros(len(ids), 4, 2, device="meta")

        def logits(self, streams):
            return streams

        def forward_mtp(self, streams, ids, cache, block=0):
            seen.append(ids.device.type)
            return streams

    _forward(Elsewhere(), [1, 2, 3], 2)
    assert seen == ["meta"] * 3


def test_a_chunk_beyond_every_context_is_refused(dsv4, tiny, tmp_path):
    flags = ("--ids", "0,5", "--out", tmp_path / "x", "--chunk")
    code, _, err = dsv4("dump", tiny, *flags, str(10**30))
    assert code == 2
    assert err.startswith("error: --chunk: expected 1 to 1,073,741,824, got 1000")


def test_sha256_covers_what_is_no_shard(dsv4, copy, tmp_path):
    manifest = tmp_path / "SUMS"
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n"
             for p in sorted(copy.iterdir())]  # fmt: skip
    manifest.write_text("".join(lines))
    assert dsv4("verify", copy, "--sha256", manifest)[0] == 0
    with (copy / "config.json").open("a") as file:
        file.write("\n")
    code, out, _ = dsv4("verify", copy, "--sha256", manifest)
    assert code == 3
    assert "FAIL  sha256  config.json" in out
    assert out.splitlines()[-1].endswith(", 1 problem (exit 3)")


def test_more_threads_than_the_machine_can_hold(dsv4, tiny, monkeypatch):
    most = max(64, 4 * os.cpu_count())
    code, _, err = dsv4("generate", tiny, "-p", "x", "--threads", most + 1)
    assert code == 2
    assert f"error: --threads: expected 1 to {most:,}, got {most + 1}" in err
    assert env.read({"DSV4_THREADS": str(most)})["DSV4_THREADS"] == most
    for text in (str(most + 1), "9" * 5000):
        with pytest.raises(RequestError, match=f"an integer from 1 to {most:,}"):
            env.read({"DSV4_THREADS": text})
    monkeypatch.setenv("DSV4_THREADS", str(most + 1))
    assert "DSV4_THREADS" in dsv4("generate", tiny, "-p", "x")[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--raw", "--think", "high"], "error: --raw: expected no --think beside it"),
        (["--raw", "--chat"], "error: --raw: expected no --chat beside it"),
        (["--system", "x"], "error: --system: expected --chat or --think beside it"),
    ],
)
def test_contradictions_name_the_flags(dsv4, tiny, flags, message):
    err = dsv4("generate", tiny, "-p", "x", *flags)[2]
    assert err.startswith(message)
    assert "\nfix: " in err


@pytest.mark.parametrize("ids", ["", "1,,2", "x"])
def test_ids_that_are_none_say_how_to_write_them(dsv4, tiny, tmp_path, ids):
    err = dsv4("dump", tiny, "--ids", ids, "--out", tmp_path / "x")[2]
    assert err.endswith("fix: write the ids with commas between them: --ids 1,2,3\n")


def test_counts_are_in_the_singular_and_in_the_plural(dsv4, tiny, tmp_path):
    from dsv4.cli.terminal import count

    assert [count(n, "tap") for n in (0, 1, 1200)] == ["0 taps", "1 tap", "1,200 taps"]
    flags = ("--ids", "0", "--taps", "logits", "--out", tmp_path / "x")
    assert "1 tap of 1 token, " in dsv4("dump", tiny, *flags)[2]
    assert dsv4("inspect", tiny, "--tensors", "norm.weight")[2].startswith("1 tensor, ")


def test_a_missing_file_is_not_to_be_deleted(dsv4, copy):
    sorted(copy.glob("*.safetensors"))[0].unlink()
    code, out, _ = dsv4("verify", copy)
    assert code == 3
    assert "fix: download it into this folder" in out
    assert "delete" not in out


def test_extras_are_installed_for_this_python(dsv4, monkeypatch):
    from dsv4.cli import doctor

    monkeypatch.setattr("dsv4.kernels.common.launch.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "transformers" else real(p))
    out = dsv4("doctor")[1]
    assert f"{sys.executable} -m pip install 'dsv4-inference[hf]'" in out
    assert "-e '.[hf]'" in out
    assert "verdict  tier 1 usable" in out


def test_chat_into_a_closed_pipe_is_silent(tiny):
    reader = f"{sys.executable} -c 'import os; os.close(0)'"
    command = f"(sleep 1; echo Hello; echo Hi) | {sys.executable} -m dsv4 chat {tiny} -n 2 --quiet"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | {reader}"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("command", [["generate", "-"], ["chat"]], ids=" ".join)
def test_stdin_that_is_not_utf8(dsv4, tiny, monkeypatch, command):
    monkeypatch.setattr(sys, "stdin", Bytes(b"Gr\xfc\xdfe\n"))
    code, _, err = dsv4(command[0], tiny, *command[1:])
    assert code == 2
    assert "error: prompt: expected UTF-8 in stdin" in err
    assert err.endswith("fix: convert it to UTF-8\n")


def test_stdin_is_utf8_whatever_the_locale(dsv4, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Bytes("Grüße".encode()))
    assert "Grüße" in dsv4("generate", tiny, "-", "--print-prompt")[1]


def test_a_chat_reads_every_line_of_a_pipe(dsv4, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Bytes("Grüße\n/help\n/quit\nHello\n".encode()))
    code, _, err = dsv4("chat", tiny, "-n", "1")
    assert code == 0, err
    assert "/quit                    leave" in err
    assert "error" not in err


@pytest.mark.parametrize(
    ("words", "others"),
    [
        (["plan"], ", flash or pro"),
        (["inspect"], ", flash or pro"),
        (["dump", "--ids", "1", "--out", "x"], ", flash or pro"),
        (["generate", "-p", "x"], ""),
        (["chat"], ""),
        (["verify"], ""),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_model_that_is_none_names_those_that_the_verb_takes(
    dsv4, monkeypatch, tmp_path, words, others
):
    monkeypatch.chdir(tmp_path)
    code, _, err = dsv4(words[0], "bogus", *words[1:])
    assert code == 3
    assert err.endswith(f"\nfix: give a checkpoint folder, or: nano{others}\n")


@pytest.mark.parametrize(
    ("flags", "came"),
    [
        ([], "none was given"),
        (["-p", "a", "-"], "two were given"),
        (["-p", "a", "-", "-f", "b"], "3 were given"),
    ],
)
def test_prompts_that_are_not_one_are_counted(dsv4, tiny, flags, came):
    err = dsv4("generate", tiny, *flags)[2]
    assert err == f"error: prompt: expected one of -p TEXT, -f FILE and -, {came}\n"


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ([], "shorten the prompt"),
        (["--max-context", "4096"], "shorten the prompt"),
        (["--max-context", "4095"], "shorten the prompt, or raise --max-context"),
    ],
)
def test_a_limit_of_the_model_cannot_be_raised(dsv4, tiny, tmp_path, flags, fix):
    (tmp_path / "long").write_text("Hello " * 5000)
    for verb in (["generate"], ["dump", "--out", tmp_path / "x"]):
        code, _, err = dsv4(verb[0], tiny, *verb[1:], "-f", tmp_path / "long", *flags)
        assert code == 2
        assert err.endswith(f"\nfix: {fix}\n")


def test_a_message_beyond_the_limit_of_the_model(dsv4, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Bytes(b"Hello " * 5000 + b"\n/quit\n"))
    code, _, err = dsv4("chat", tiny)
    assert code == 0
    assert err.endswith("\nfix: shorten the message\n")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_an_unknown_flag_shows_the_usage_of_its_verb(dsv4, verb):
    words = {"bench": ["decode", "m"], "doctor": [], "dump": ["m", "--out", "x"]}
    words["convert"] = ["m", "--to", "bf16", "--out", "x"]
    code, _, err = dsv4(verb, *words.get(verb, ["m"]), "--bogus")
    assert code == 2
    assert err.startswith(f"usage: dsv4 {verb} ")
    assert err.endswith(f"dsv4 {verb}: error: unrecognized arguments: --bogus\n")


def test_sizes_are_not_rounded_away():
    from dsv4.cli.terminal import gib

    sizes = [gib(n) for n in (0, 1536, 2**20 // 10, 2**20, 2**30 // 10, 2**30)]
    assert sizes == ["0.0 KiB", "1.5 KiB", "102.4 KiB", "1.0 MiB", "102.4 MiB", "1.0 GiB"]


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_stop_id_outside_the_vocabulary(dsv4, tiny, monkeypatch, verb):
    monkeypatch.setattr("dsv4.loader.Checkpoint.load", None)
    flags = ["-p", "x"] if verb == "generate" else []
    code, _, err = dsv4(verb, tiny, *flags, "--stop-id", "512")
    assert code == 2
    assert "error: --stop-id: expected 0 to 511, got 512" in err


@pytest.mark.parametrize("where", ["write", "flush"])  # without a buffer and with one
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_that_cannot_be_written(monkeypatch, capfd, words, where):
    def fail(self, *text):
        raise OSError(28, "No space left on device")

    full = type("Full", (io.StringIO,), {where: fail})()
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(sys, "argv", ["dsv4", *words])
    with pytest.raises(SystemExit) as e:
        cli.console()
    assert e.value.code == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("No space left on device\n")
    assert err.count("\n") == 1


def test_help_into_a_closed_pipe_is_silent():
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(
            [sys.executable, "-m", "dsv4", "--help"], stdout=writer, stderr=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
        os.close(writer)
        assert (result.returncode, result.stderr) == (1, b"")


def test_a_model_that_only_plan_knows(dsv4):
    for verb, *flags in (["generate", "-p", "x"], ["chat"], ["verify"]):
        code, _, err = dsv4(verb, "flash", *flags)
        assert code == 3
        assert "fix: flash and pro are names only for plan and inspect" in err


def test_plan_says_units_and_where_the_weights_are_from(dsv4, tiny):
    assert "units are GiB" in " ".join(dsv4("plan", "--help")[1].split())
    assert "bytes, from config.json)" in dsv4("plan", tiny)[1]
    assert "from config.json" not in dsv4("plan", "flash")[1]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_of_no_tensor(dsv4, tiny, flags):
    code, _, err = dsv4("inspect", tiny, "--tensors", "nothing*", *flags)
    assert code == 1
    assert "no tensor matches nothing*" in err


@pytest.mark.parametrize(
    ("command", "flag"),
    [(["generate", "-f", "absent"], "--file"), (["dump", "--ids", "@absent"], "--ids"),
     (["generate", "-p", "x", "--logprobs", "absent/x"], "--logprobs"),
     (["generate", "-f", "."], "--file")],
)  # fmt: skip
def test_files_that_cannot_be_opened_name_their_flag(
    dsv4, tiny, tmp_path, monkeypatch, command, flag
):
    monkeypatch.chdir(tmp_path)
    verb, *flags = command
    code, _, err = dsv4(verb, tiny, *flags, *(["--out", "x"] if verb == "dump" else []))
    assert code == 2
    assert f"error: {flag}: expected a file that can be" in err


# chat


@pytest.fixture
def talk(dsv4, tiny, monkeypatch):
    def run(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        return dsv4("chat", tiny, "-n", "4", *flags)

    return run


def test_a_full_chat_goes_on_after_new(talk, tmp_path):
    import json

    path = tmp_path / "c.json"
    full = ["Hello " * 4] * 6
    code, _, err = talk(
        [*full, "/new", "Hi", f"/save {path}", "/help"], "--max-context", "60",
        "--system", "Be brief.",
    )  # fmt: skip
    assert code == 0
    assert "error: prompt: expected 1 to 60 tokens" in err
    assert "fix: shorten the message; /new drops the history" in err
    assert "/new " in err.split("Be brief")[-1]
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "Hi"


def test_an_answer_that_fills_the_context_says_so(talk):
    err = talk(["Hi"], "--max-context", "20", "-n", "4000", "--ignore-eos")[2]
    assert "[length] the context is full: /new drops the history" in err
    assert "is full" not in talk(["Hi"], "--max-context", "20", "-n", "1", "--ignore-eos")[2]


@pytest.mark.parametrize("word", ["/read", "/save"])
def test_commands_ask_for_their_file(talk, word):
    err = talk([word, f"{word} "])[2]
    assert err.count(f"error: {word}: expected FILE behind it, got ''") == 2
