"""On a GPU: every fused kernel against its parts, on the bundled model and at full width."""

import pytest

from dsv4.cli.main import OK
from dsv4.model.block import FUSED

pytestmark = pytest.mark.gpu
# Layers of every kind (SWA, CSA, HCA; Pro has no SWA), routed by hash and by score.
SLICES = {"flash": ["--layers", "6"], "pro": ["--layers", "5"]}
EVERY = [(model, "all") for model in SLICES]


@pytest.mark.parametrize(("model", "name"), [*(("flash", name) for name in FUSED), *EVERY])
def test_full_width(dsv4, model, name):
    flags = [*SLICES[model], "--experts", "8", "--no-fusion", name, "--device", "cuda", "--all"]
    code, out, err = dsv4("diff", model, *flags)
    assert code == OK, out + err


@pytest.mark.parametrize("name", ["joined_wide_linear", "entry_and_key_insert"])
def test_a_prompt_so_long_that_index_keys_decide(dsv4, name):
    """Up to 2048 tokens, Flash takes every entry; here 576 have 512 places."""
    taps = "*.topk,*.attn.out,*.ffn.out,*.router.*"
    flags = ["--layers", "3", "--experts", "8", "--tokens", "2305", "--taps", taps]
    code, out, err = dsv4("diff", "flash", *flags, "--no-fusion", name, "--device", "cuda", "--all")
    assert code == OK, out + err


@pytest.mark.parametrize("name", [*FUSED, "all"])
def test_nano(dsv4, name):
    flags = ["--tokens", "385", "--no-fusion", name, "--device", "cuda", "--all"]
    code, out, err = dsv4("diff", "nano", *flags)
    assert code == OK, out + err
