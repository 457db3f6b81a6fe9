"""The flags of tier 2, and its gate: the bundled model through the kernels."""

from types import SimpleNamespace

import pytest
import torch

import dsv4.cli.model as cli_model
import dsv4.cli.tier2 as tier2
import dsv4.kernels.common.launch as launch
from dsv4.cli.main import FAILED, HARDWARE, OK, USAGE
from dsv4.core.errors import RequestError
from dsv4.layers.moe import SharedExpert
from support.oracle_ops import use_oracles

PARIS = ["generate", "nano", "--tier", "2", "-p", "The capital of France is"]


def test_paris_through_the_kernels(dsv4):
    """On a CPU under Triton's interpreter: a prompt of six tokens, and the next."""
    code, out, err = dsv4(*PARIS, "-n", "1", "--expect", "Paris", "--max-context", "256")
    assert code == OK, err
    assert "PASS" in out
    assert "tier 2 bfloat16" in err


INTERPRET = "TRITON_INTERPRET=1 with --device cpu for a few tokens (minutes)"
BENCH = "bench needs a CUDA GPU; on a CPU: make bench"
FLASH = ["dump", "flash", "--tier", "2", "--layers", "1", "--experts", "8", "--tokens", "5"]


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (PARIS, f"use --tier 1, or {INTERPRET}"),
        ([*PARIS, "--device", "cuda"], f"use --tier 1, or {INTERPRET}"),
        ([*PARIS, "--device", "cuda:1"], f"use --tier 1, or {INTERPRET}"),
        ([*FLASH, "--out", "x"], f"use {INTERPRET}"),
        (["bench", "decode", "nano"], BENCH),
        (["bench", "decode", "nano", "--device", "cpu"], BENCH),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_the_way_out_where_no_kernel_can_run_leads_out(dsv4, monkeypatch, tmp_path, argv, fix):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = dsv4(*argv)
    assert (code, out) == (HARDWARE, "")
    assert err.endswith(f"\nfix: {fix}\n")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiers_are_not_compared_before_all_can_run(dsv4, monkeypatch, device):
    monkeypatch.setattr("dsv4.loader.Checkpoint.load", None)  # what tier 1 begins with
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = dsv4("diff", "nano", "--tiers", "1,2", "-p", "x", "--device", device)
    assert (code, out) == (HARDWARE, "")
    assert err.startswith(f"error: device {device}: ")
    assert err.endswith(f"\nfix: use {INTERPRET}\n")


def test_a_gpu_that_was_not_asked_for(dsv4, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = dsv4(*PARIS)
    assert code == HARDWARE
    assert err.endswith("fix: use --device cuda\n")


@pytest.mark.parametrize(
    "flags", [["--simulate-kv-quant", "on"], ["--keep-packed"], ["--dtype", "float64"]], ids=str
)
def test_flags_of_tier_1_are_refused(dsv4, flags):
    code, out, err = dsv4(*PARIS, *flags)
    assert (code, out) == (USAGE, "")
    assert flags[0] in err
    assert "--tier 1" in err


@pytest.mark.parametrize("context", ["0", "1", "1048577"])
def test_a_context_that_cannot_be(dsv4, context):
    code, _, err = dsv4(*PARIS, "--max-context", context)
    assert code == USAGE
    assert "--max-context" in err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["bench", "decode", "flash", "--device", "cpu"], HARDWARE),
        (["bench", "decode", "flash", "--batch", "0"], USAGE),
        (["bench", "decode"], USAGE),
        (["bench", "load", "flash"], USAGE),
    ],
    ids=str,
)
def test_benches_that_cannot_be(dsv4, argv, code):
    assert dsv4(*argv)[0] == code


def test_tiers_are_compared(dsv4, monkeypatch):
    use_oracles(monkeypatch)
    code, out, err = dsv4("diff", "nano", "--tiers", "1,2", "-p", "The capital of France is")
    assert code == OK, out + err
    assert "46 taps compared at bfloat16 limits: all within limits" in out


def test_the_first_sub_block_that_is_broken_is_named(dsv4, monkeypatch):
    use_oracles(monkeypatch)
    monkeypatch.setattr(SharedExpert, "__call__", lambda self, x: 0 * x)
    code, out, _ = dsv4("diff", "nano", "--tiers", "1,2", "-p", "The capital of France is")
    assert code == FAILED
    assert "diverged, first layers.0.ffn.out" in out


def test_more_than_one_token(dsv4, monkeypatch):
    use_oracles(monkeypatch)
    words = ["-p", "The capital of Japan is", "-n", "5"]
    one, two = (dsv4("generate", "nano", "--tier", tier, *words)[1] for tier in ("1", "2"))
    assert one == two
    assert "Tokyo" in two


@pytest.mark.parametrize(
    ("argv", "will_generate"),
    [
        (PARIS, True),
        (["chat", "nano", "--tier", "2"], True),
        (["dump", *PARIS[1:], "--out", "taps"], False),
        (["diff", "nano", "--tiers", "2,1", "-p", "x"], False),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_verbs_that_generate_ask_for_a_recorded_step(
    dsv4, monkeypatch, tmp_path, argv, will_generate
):
    asked = []

    def refuse(args, checkpoint, progress, will_generate):
        asked.append(will_generate)
        raise RequestError("model", "another one", "this one")

    monkeypatch.setattr(cli_model, "load_production", refuse)
    monkeypatch.chdir(tmp_path)
    assert dsv4(*argv)[0] == USAGE
    assert asked == [will_generate]


@pytest.mark.parametrize(("device", "num_captures"), [("cuda", 1), ("cpu", 0)])
def test_the_step_is_recorded_on_a_gpu(monkeypatch, device, num_captures):
    captures = []
    one = SimpleNamespace(device=torch.device(device), capture=lambda: captures.append(1))
    monkeypatch.setattr(tier2, "_production", lambda *args: one)
    checkpoint = SimpleNamespace(stream=lambda *args, **kw: (), config=None)
    assert tier2.load_production(None, checkpoint, None, will_generate=False) is one
    assert not captures
    assert tier2.load_production(None, checkpoint, None, will_generate=True) is one
    assert len(captures) == num_captures


@pytest.mark.parametrize(
    "argv",
    [
        ["diff", "nano", "--tiers", "1,2"],
        ["diff", "nano", "--tiers", "1,1", "-p", "x"],
        ["diff", "nano", "b", "--tiers", "1,2", "-p", "x"],
        ["diff", "a"],
        ["diff", "a", "b", "-p", "x"],
    ],
    ids=str,
)
def test_comparisons_that_cannot_be(dsv4, argv):
    assert dsv4(*argv)[0] == USAGE
