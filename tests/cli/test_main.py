import os
import subprocess
import sys

import pytest

from dsv4.cli import main as cli
from dsv4.core import env
from dsv4.core.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceUnavailable,
    KernelUnavailable,
    MissingExtra,
    RequestError,
)

COMMANDS = [["--help"], *([verb, "--help"] for verb in cli.VERBS)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_neither_torch_nor_tokenizers(command):
    code = (
        "import sys; from dsv4.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(len({'torch', 'tokenizers', 'rich', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: dsv4" in result.stdout


@pytest.mark.parametrize(
    ("verb", "text"),
    [
        ("generate", "Continue one prompt, streamed."),
        ("bench", "How long a step takes on a GPU,"),
        ("plan", "Does it fit: memory of weights and KV cache."),
        ("convert", "Write a checkpoint as BF16,"),
    ],
)
def test_help_keeps_names_as_they_are(dsv4, verb, text):
    assert f"\n\n{text}" in dsv4(verb, "--help")[1]


def test_help_is_fast():
    def seconds() -> float:  # of a processor: the wall clock counts other work too
        start = os.times()
        subprocess.run([sys.executable, "-m", "dsv4", "--help"], check=True, capture_output=True)
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system

    assert min(seconds() for _ in range(5)) < 0.25


def test_every_verb_is_listed(dsv4):
    code, out, _ = dsv4("--help")
    assert code == 0
    assert all(verb in out for verb in cli.VERBS)


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["generate"], ["plan", "flash", "--memory", "x"], ["dump", "x"]]
)
def test_usage_errors_exit_2(dsv4, argv):
    code, out, err = dsv4(*argv)
    assert code == 2
    assert "usage:" in err
    assert out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("a", "b", "c"), 2),
        (MissingExtra("p", "e"), 2),
        (FileNotFoundError(2, "gone"), 2),
        (ConfigError("f", "x", "y"), 3),
        (CheckpointError("kind", "file"), 3),
        (KernelUnavailable("no"), 4),
        (DeviceUnavailable("cuda", "none here"), 4),
        (CapacityError("x", 2, 1), 5),
        (MemoryError(), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), 5),
        (RuntimeError("shape"), None),
        (KeyError("x"), None),
    ],
)
def test_exit_codes(error, code):
    assert cli.exit_code(error) == code


def boom(error):
    def run(args, terminal):
        raise error

    return run


def test_errors_are_two_lines_without_traceback(dsv4, monkeypatch):
    error = CheckpointError("missing", "config.json", detail="gone \x1b[31m", fix="fetch it")
    monkeypatch.setattr("dsv4.cli.doctor.run", boom(error))
    code, out, err = dsv4("doctor")
    assert (code, out) == (3, "")
    assert err == "error: missing: config.json: gone [31m\nfix: fetch it\n"


def test_debug_shows_the_traceback(dsv4, monkeypatch):
    monkeypatch.setattr("dsv4.cli.doctor.run", boom(RequestError("a", "b", "c")))
    monkeypatch.setenv("DSV4_DEBUG", "1")
    assert "Traceback" in dsv4("doctor")[2]


def test_out_of_memory_says_what_to_do(dsv4, monkeypatch):
    monkeypatch.setattr("dsv4.cli.doctor.run", boom(MemoryError()))
    code, _, err = dsv4("doctor")
    assert code == 5
    assert "fix: shorten the context" in err


def test_interrupt_exits_130(dsv4, monkeypatch):
    monkeypatch.setattr("dsv4.cli.doctor.run", boom(KeyboardInterrupt()))
    assert dsv4("doctor")[0] == 130


def test_a_defect_is_not_dressed_up(dsv4, monkeypatch):
    monkeypatch.setattr("dsv4.cli.doctor.run", boom(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        dsv4("doctor")


def test_closed_stdout_is_no_traceback():
    command = f"{sys.executable} -m dsv4 inspect flash --tensors '*' | head -1"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True
    )
    assert result.stdout.startswith("embed.weight")
    assert result.stderr == ""
    assert result.returncode == 1


def test_unknown_variables_are_warned_about(dsv4, monkeypatch):
    monkeypatch.setenv("DSV4_TEIR", "1")
    assert "DSV4_TEIR is no variable of dsv4; did you mean DSV4_TIER?" in dsv4("--version")[2]


def test_a_variable_without_meaning_is_a_usage_error(dsv4, monkeypatch):
    monkeypatch.setenv("DSV4_TIER", "7")
    code, _, err = dsv4("doctor")
    assert code == 2
    assert "DSV4_TIER" in err


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_needs_no_sound_variables(dsv4, monkeypatch, words):
    monkeypatch.setenv("DSV4_TIER", "7")
    monkeypatch.setenv("DSV4_THREADS", "many")
    code, out, err = dsv4(*words)
    assert (code, err) == (0, "")
    assert "dsv4" in out


def test_variables_of_the_tests_are_neither_read_nor_warned_about(dsv4, monkeypatch):
    for name in ("DSV4_ORACLE_CONFIGS", "DSV4_STRESS_OPERATIONS"):
        assert name not in env.VARIABLES
        monkeypatch.setenv(name, "nonsense")
    code, _, err = dsv4("plan", "flash", "--memory", "1T")
    assert (code, err) == (0, "")


def test_variables_set_the_defaults(monkeypatch):
    for name, value in (("DSV4_TIER", "0"), ("DSV4_DTYPE", "bfloat16"), ("DSV4_QUIET", "1")):
        monkeypatch.setenv(name, value)
    args = cli.build_parser().parse_args(["generate", "nano"])
    assert (args.tier, args.dtype, args.quiet) == (0, "bfloat16", True)
    assert cli.build_parser().parse_args(["generate", "nano", "--tier", "1"]).tier == 1


def test_every_variable_reads_its_default_and_refuses_nonsense():
    assert set(env.read({})) == set(env.VARIABLES)
    assert env.read({"DSV4_DEBUG": ""})["DSV4_DEBUG"] is False
    for name in env.VARIABLES:
        with pytest.raises(RequestError, match=name):
            env.read({name: "nonsense"})
    for text in ("0", "-1", "1.5", "\u0663"):
        with pytest.raises(RequestError):
            env.read({"DSV4_THREADS": text})
    assert env.read({"DSV4_DEBUG": "on", "DSV4_THREADS": "3"})["DSV4_THREADS"] == 3


def test_variables_in_the_code_are_registered():
    import re
    from pathlib import Path

    import dsv4

    text = "\n".join(p.read_text("utf-8") for p in Path(dsv4.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"DSV4_[A-Z][A-Z_]*[A-Z]", text)) == set(env.VARIABLES)
