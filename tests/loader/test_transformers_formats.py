"""Files that transformers itself writes, both ways, plain and quantised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4.core.config_dialects import to_official as official_config
from dsv4.core.errors import CheckpointError
from dsv4.core.formats import BlockScaledTensor
from dsv4.loader import Checkpoint
from dsv4.loader.convert import slice_checkpoint, transformers_state_dict
from dsv4.loader.names import stacked_experts, to_transformers
from dsv4.loader.writer import stored_parts
from dsv4.testing.tiny import random_weights, tiny_config
from support.checkpoints import assert_same_weights, config_of, same_weight, weights_of

NO_MTP = "no MTP block: transformers does not save it"


def hf_config(kind: str) -> DeepseekV4Config:
    raw = official_config(config_of(kind))
    return DeepseekV4Config(**{k: v for k, v in raw.items() if k != "architectures"})


def hf_model(kind: str, dtype: torch.dtype) -> DeepseekV4ForCausalLM:
    """transformers' own model with the weights of the plain tiny checkpoint."""
    model = DeepseekV4ForCausalLM(hf_config(kind))
    missing = model.load_state_dict(transformers_state_dict(weights_of(kind)), strict=False)
    assert missing.unexpected_keys == []
    assert [k for k in missing.missing_keys if "rotary" not in k] == []
    return model.to(dtype)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_models_both_ways(dtype: torch.dtype, original: bool, tmp_path: Path) -> None:
    hf_model("plain", dtype).save_pretrained(tmp_path, save_original_format=original)
    ck = Checkpoint.open(tmp_path)
    assert (ck.dialect, ck.notices) == ("transformers", [NO_MTP])
    assert ck.config.num_nextn_predict_layers == 0
    assert ck.config.compress_ratios == config_of("plain").compress_ratios
    want = {n: w for n, w in weights_of("plain").items() if not n.startswith("mtp.")}
    want = {n: w if n.endswith("tid2eid") else w.to(dtype) for n, w in want.items()}
    assert_same_weights(ck.load(), want)
    assert ck.verify(deep=True) == []


def test_sharded_by_transformers(tmp_path: Path) -> None:
    model = hf_model("plain", torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="1MB")
    ck = Checkpoint.open(tmp_path)
    assert len(ck.shards) > 3
    assert {spec.dtype for _, spec, _ in ck.tensors()} == {"BF16", "I64"}
    ck.load()


# Quantised models can only be saved by transformers on a GPU; these are its files as observed
# there with version 5.23: names, dtypes, config.


def quantised_file(folder: Path, original: bool, fp8_scale: str = "F8_E8M0") -> Path:
    """What save_pretrained writes of a quantised model: norms in F32, no MTP block."""
    config = config_of("official")
    weights = random_weights(config, seed=7, fp8_scale_dtype=fp8_scale)
    tensors: dict[str, torch.Tensor] = {}
    for parameter, weight in weights.items():
        if not parameter.startswith("mtp."):
            tensors |= stored_parts(parameter, weight)
    tensors = {n: x.float() if "norm." in n else x for n, x in tensors.items()}
    named = original_names(tensors) if original else runtime_names(tensors)
    folder.mkdir()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    raw = hf_config("official").to_dict()
    raw["quantization_config"] = {
        "activation_scheme": "dynamic", "dequantize": False, "expert_dtype": "fp4",
        "modules_to_convert": None, "modules_to_not_convert": None, "quant_method": "fp8",
        "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def original_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, x in tensors.items():
        if name.startswith("layers."):
            name = "model." + name.replace(".attn.kv_norm.", ".attn.norm.")
        elif name != "head.weight":
            name = str(to_transformers(name))
        out[name] = x
    return out


def runtime_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name in tensors:
        theirs = str(to_transformers(name))
        parts = stacked_experts(theirs, 8) or (name,)
        raw = torch.stack([tensors[p].contiguous().view(torch.uint8) for p in parts])
        x = raw.view(tensors[name].dtype)
        out[theirs] = x.view(8, -1, x.shape[-1]) if len(parts) > 1 else tensors[name]
    return out


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("fp8_scale", ["F8_E8M0", "F32"])
def test_quantised_models_both_ways(original: bool, fp8_scale: str, tmp_path: Path) -> None:
    ck = Checkpoint.open(quantised_file(tmp_path / "hf", original, fp8_scale))
    assert (ck.dialect, ck.notices) == ("transformers", [NO_MTP])
    want = random_weights(config_of("official"), seed=7, fp8_scale_dtype=fp8_scale)
    want = {n: w for n, w in want.items() if not n.startswith("mtp.")}
    got = ck.load()
    assert list(got) == list(want)
    for name, weight in want.items():
        expected = weight.float() if name.endswith("norm.weight") else weight
        assert same_weight(got[name], expected)
    assert ck.verify(deep=True) == []


@pytest.mark.parametrize("original", [True, False])
def test_a_transformers_file_becomes_an_official_one(original: bool, tmp_path: Path) -> None:
    """Norms go back to BF16, which is exact; all else keeps its bits."""
    source = quantised_file(tmp_path / "hf", original)
    slice_checkpoint(source, tmp_path / "official")
    ck = Checkpoint.open(tmp_path / "official")
    assert ck.dialect == "official"
    want = {n: w for n, w in weights_of("official").items() if not n.startswith("mtp.")}
    assert_same_weights(ck.load(), want)


def test_parts_of_a_stack_do_not_share_memory_with_the_whole(tmp_path: Path) -> None:
    ck = Checkpoint.open(quantised_file(tmp_path / "hf", original=False))
    got = ck.load(keep=lambda name: name == "layers.2.ffn.experts.3.w3.weight")
    (weight,) = got.values()
    assert isinstance(weight, BlockScaledTensor)
    assert weight.data.untyped_storage().nbytes() == weight.data.numel()


def rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


STACK = "model.layers.1.mlp.experts.gate_up_proj"
NORM = "model.layers.1.self_attn.kv_norm.weight"


@pytest.mark.parametrize(
    ("change", "kind", "tensor"),
    [
        (lambda t: t.update({STACK: t[STACK][:, :100].contiguous()}), "shape", STACK),
        (lambda t: t.update({STACK: t[STACK][:7].contiguous()}), "shape", STACK),
        (lambda t: t.update({STACK: t[STACK].view(torch.uint8)}), "dtype", STACK),
        (lambda t: t.pop(NORM), "missing", "layers.1.attn.kv_norm.weight"),
        (lambda t: t.update({NORM: t[NORM].bfloat16()}), "dtype", NORM),
        (lambda t: t.update({NORM: t[NORM].half()}), "dtype", NORM),
        (
            lambda t: t.update({"model.layers.1.attn.norm.weight": t[NORM].clone()}),
            "duplicate",
            None,
        ),
        (
            lambda t: t.update(
                {"model.layers.1.ffn.experts.0.w1.weight": t[STACK][0, :128].clone()}
            ),
            "duplicate",
            None,
        ),
        (lambda t: t.update({f"{STACK}.bias": t[NORM].clone()}), "unexpected", f"{STACK}.bias"),
    ],
)
def test_transformers_files_are_held_to_the_config(change, kind, tensor, tmp_path: Path) -> None:
    folder = quantised_file(tmp_path / "hf", original=False)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert {p.kind for p in caught.value.problems} == {kind}
    if tensor is not None:
        assert [p.tensor for p in caught.value.problems] == [tensor]


def test_a_fresh_transformers_model_routes_every_token_to_expert_0(tmp_path: Path) -> None:
    """Its tid2eid table is all zeros until a checkpoint fills it: refused, and told why."""
    DeepseekV4ForCausalLM(hf_config("plain")).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the same expert twice") as caught:
        Checkpoint.open(tmp_path).load()
    assert len(caught.value.problems) == tiny_config().num_hash_layers
