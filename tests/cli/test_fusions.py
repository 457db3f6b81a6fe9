"""--no-fusion: every fused kernel against its parts, on the bundled model and on a random slice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.cli.main import FAILED, OK, USAGE
from dsv4.core.config import ModelConfig
from dsv4.diff.dump import TapDump
from dsv4.engine.single import SingleSequence
from dsv4.model.block import EXACT, FUSED
from support.fusions import wrap_fused
from support.oracle_ops import use_oracles
from support.production import served_config

NANO = ["diff", "nano", "-p", "The capital of France is"]
# The parts of one step alone round more often than its oracle; those of the others give its bits.
TWICE = "moe_routed_shared"
TOO_SHORT = "expected 4 tokens or more, because the last 3 are decode steps,"
ONCE = [name for name in FUSED if name != TWICE]
# Fused steps that take the place of others: which of them run hangs on either.
TIED = {"moe_with_shared": ("gate_up_swiglu",), "gate_up_swiglu": ("moe_with_shared",),
        TWICE: ("moe_with_shared", "gate_up_swiglu")}  # fmt: skip


@pytest.fixture(autouse=True)
def oracles(monkeypatch):
    use_oracles(monkeypatch)


def damage(patch: pytest.MonkeyPatch, name: str) -> None:
    """Make the fused op `name` write nothing, and return zeros."""

    def damaged(op: Any, args: tuple) -> Any:
        out = op(*[x.clone() if isinstance(x, Tensor) else x for x in args])
        for x in [out] if isinstance(out, Tensor) else out or []:
            x.zero_()
        return out

    wrap_fused(patch, name, damaged)


def test_parts_are_bit_equal_to_their_kernels(dsv4):
    code, out, err = dsv4(*NANO, "--no-fusion", ",".join(ONCE), "--json")
    assert code == OK, out + err
    report = json.loads(out)
    assert len(report["taps"]) == 46
    assert all(not t["rel_rms"] and t["num_differ"] == 0 for t in report["taps"])
    assert report["notes"] == [f"A runs nothing as parts, B {', '.join(ONCE)}"]


def test_bits_decide_where_parts_give_those_of_the_whole(dsv4, monkeypatch):
    """A last bit of one element, far within every limit."""

    def nudged(op: Any, args: tuple) -> Any:
        out = op(*args)
        first = out.view(-1)[:1]
        first.view(torch.int16).bitwise_xor_(1)
        return out

    wrap_fused(monkeypatch, "q_norm_rope", nudged)
    code, out, _ = dsv4(*NANO, "--no-fusion", "q_norm_rope")
    assert code == FAILED
    assert "layers.0.attn.q" in out
    for names in ("q_norm_rope,mhc_post_pre", "cache_step_append"):
        code, out, err = dsv4(*NANO, "--no-fusion", names)
        assert code == OK, out + err


def test_a_sum_rounded_twice_is_within_its_limits(dsv4):
    code, out, err = dsv4(*NANO, "--no-fusion", TWICE, "--json")
    assert code == OK, out + err
    assert any(t["rel_rms"] for t in json.loads(out)["taps"])


def test_an_answer_of_parts_alone(dsv4, monkeypatch):
    for name in FUSED:
        damage(monkeypatch, name)
    words = ["generate", "nano", "--tier", "2", "-p", "The capital of France is", "-n", "2"]
    code, out, err = dsv4(*words, "--no-fusion", "all", "--expect", "Paris")
    assert code == OK, out + err
    assert dsv4(*words, "--expect", "Paris")[0] == FAILED


@pytest.fixture
def small_flash(monkeypatch) -> ModelConfig:
    """Flash as small as tests need it; its random weights would fill the memory."""
    config = served_config()
    monkeypatch.setattr(ModelConfig, "flash", lambda: config)
    return config


@pytest.mark.parametrize("name", FUSED)
def test_a_damaged_kernel_differs_from_its_parts_alone(dsv4, small_flash, monkeypatch, name):
    words = ["diff", "flash", "--tokens", "12", "--no-fusion"]
    damage(monkeypatch, name)
    code, out, err = dsv4(*words, name)
    assert code == FAILED, out + err
    assert "diverged, first" in out
    tied = (name, *TIED.get(name, ()))
    others = ",".join(other for other in ONCE if other not in tied)
    code, out, err = dsv4(*words, others)
    assert code == OK, out + err
    assert "every tap is equal" in out


def test_a_slice_of_random_weights(dsv4, small_flash, monkeypatch):
    chunks, step = [], SingleSequence._step

    def watching(self, ids, cache, is_prefill):
        chunks.append((len(ids), is_prefill))
        return step(self, ids, cache, is_prefill)

    monkeypatch.setattr(SingleSequence, "_step", watching)
    flags = ["--layers", "3", "--experts", "5", "--no-fusion", ",".join(ONCE)]
    code, out, err = dsv4("diff", "flash", *flags)
    assert code == OK, out + err
    assert "every tap is equal" in out
    assert chunks == 2 * [(382, True), (1, False), (1, False), (1, False)]


def test_what_a_dump_of_a_slice_says_of_itself(dsv4, small_flash, tmp_path):
    words = ["dump", "flash", "--tier", "2", "--layers", "2", "--tokens", "9", "--taps", "logits"]
    for name, flags in {
        "whole": [],
        "parts": ["--no-fusion", "cache_step_append,mhc_post_pre"],
        "fewer": ["--experts", "4"],
    }.items():
        assert dsv4(*words, "--decode", "2", "--out", tmp_path / name, *flags)[0] == OK
    whole, parts, fewer = (TapDump(tmp_path / n).info for n in ("whole", "parts", "fewer"))
    assert (whole.model, whole.tier, whole.parts) == ("flash", 2, ())
    assert parts.parts == ("mhc_post_pre", "cache_step_append")
    assert len(whole.ids) == 9
    assert whole.ids == parts.ids == fewer.ids
    assert whole.config == parts.config != fewer.config
    code, out, _ = dsv4("diff", tmp_path / "whole", tmp_path / "parts")
    assert code == OK
    assert "A runs nothing as parts, B mhc_post_pre, cache_step_append" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*NANO, "--no-fusion", "everything"], "expected one or more of mhc_post_pre, "),
        ([*NANO, "--no-fusion", "mhc_post_pre,"], "got ''"),
        ([*NANO, "--no-fusion", "all", "--tiers", "1,2"], "--tiers"),
        ([*NANO, "--no-fusion", "all", "--tokens", "5"], "one of -p TEXT and --tokens"),
        ([*NANO, "--no-fusion", "all", "--layers", "2"], "flash or pro"),
        ([*NANO, "--no-fusion", "all", "--device", "gpu"], "usage: dsv4 diff"),
        (["diff", "nano", "--no-fusion", "all"], "one of -p TEXT and --tokens"),
        (["diff", "nano", "b", "--no-fusion", "all", "-p", "x"], "--no-fusion"),
        (["diff", "nano", "--no-fusion", "all", "--tokens", "3"], f"--tokens: {TOO_SHORT} got 3"),
        (["diff", "nano", "--no-fusion", "all", "-p", "Hi"], f"-p: {TOO_SHORT} got 2"),
        (["diff", "nano", "--no-fusion", "all", "--tokens", "0"], "--tokens: expected 1 to"),
        (["diff", "nano", "--tiers", "1,2", "--tokens", "40000"], "fix: lower --tokens"),
        (["diff", "a", "b", "--tokens", "5"], "second dump"),
        (
            ["diff", "flash", "--no-fusion", "all", "-p", "x"],
            "-p: expected --tokens N: flash has no tokenizer",
        ),
        (["diff", "flash", "--no-fusion", "all", "--layers", "44"], "--layers"),
        (
            ["diff", "flash", "--tiers", "1,2"],
            "--tiers: expected a checkpoint: flash has random "
            "weights, which only tier 2 takes, got 'flash'\nfix: use --no-fusion, or a checkpoint",
        ),
        (["dump", "nano", "--tokens", "5", "--ids", "1", "--out", "x"], "--ids"),
        (["dump", "nano", "--tokens", "0", "--out", "x"], "--tokens"),
        (["dump", "nano", "--ids", "1", "--decode", "-1", "--out", "x"], "--decode"),
        (["dump", "nano", "--ids", "1", "--no-fusion", "all", "--out", "x"], "--tier 2"),
        (["generate", "nano", "-p", "x", "--no-fusion", "all"], "--tier 2"),
    ],
    ids=lambda x: " ".join(x[1:]) if isinstance(x, list) else "",
)
def test_misuse(dsv4, argv, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = dsv4(*argv)
    assert (code, out) == (USAGE, "")
    assert err.startswith(("error:", "usage:"))
    assert said in err


@pytest.mark.parametrize("verb", ["generate", "chat", "dump", "diff", "bench"])
def test_the_help_of_every_verb_that_runs_kernels_has_it(dsv4, verb):
    assert "--no-fusion NAME[,NAME]" in dsv4(verb, "--help")[1]


def test_the_documentation_lists_every_name_and_how_its_parts_compare():
    text = Path(__file__).parents[2].joinpath("docs/engine.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in text.splitlines()]
    told = {row[1]: row[3] for row in rows if len(row) == 5 and row[1] in FUSED}
    assert told == {n: "bit for bit" if n in EXACT else "within limits" for n in FUSED}
