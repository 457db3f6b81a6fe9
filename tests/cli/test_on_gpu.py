"""On a GPU: fused kernels against their parts, on the bundled model and at full width."""

import json

import pytest

from dsv4.cli.main import OK
from dsv4.model.block import EXACT, FUSED

pytestmark = pytest.mark.gpu
# Layers of every kind (SWA, CSA, HCA; Pro has no SWA), routed by hash and by score.
SLICES = {"flash": ["--layers", "6"], "pro": ["--layers", "5"]}
EVERY = [(model, "all") for model in SLICES]


def check(dsv4, model, name, *flags):
    """Within limits, and bit for bit where the parts round as the kernel does."""
    argv = ["diff", model, *flags, "--no-fusion", name, "--device", "cuda", "--json"]
    code, out, err = dsv4(*argv)
    assert code == OK, out + err
    if name in EXACT:
        taps = json.loads(out)["taps"]
        assert [t["name"] for t in taps if t["rel_rms"] or t["num_differ"]] == []


@pytest.mark.parametrize(("model", "name"), [*(("flash", name) for name in FUSED), *EVERY])
def test_full_width(dsv4, model, name):
    check(dsv4, model, name, *SLICES[model], "--experts", "8")


@pytest.mark.parametrize("name", ["joined_wide_linear", "entry_and_key_insert", "index_query_rope"])
def test_a_prompt_so_long_that_index_keys_decide(dsv4, name):
    """Up to 2048 tokens, Flash takes every entry; here 576 have 512 places."""
    taps = "*.topk,*.attn.out,*.ffn.out,*.router.*"
    flags = ["--layers", "3", "--experts", "8", "--tokens", "2305", "--taps", taps]
    check(dsv4, "flash", name, *flags)


@pytest.mark.parametrize("name", [*FUSED, "all"])
def test_nano(dsv4, name):
    check(dsv4, "nano", name, "--tokens", "385")
