"""What is written is what is read, bit for bit, in every format."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dsv4.core.errors import CapacityError, CheckpointError, ConfigError
from dsv4.core.formats import FORMATS, NVFP4, BlockScaledTensor
from dsv4.core.inventory import tensor_specs
from dsv4.loader import Checkpoint, write_checkpoint
from dsv4.loader.memory import free_memory
from dsv4.loader.writer import stored_parts
from dsv4.testing.mutate import add_tensor, set_config, shard_path
from dsv4.testing.tiny import random_block_scaled, random_weights, tiny_config
from support.checkpoints import (
    CONFIGS,
    SHARD_BYTES,
    assert_same_weights,
    config_of,
    same_bits,
    weights_of,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden_small"


@pytest.mark.parametrize("kind", CONFIGS)
def test_write_then_load_is_bit_equal(kind: str, sound) -> None:
    ck = Checkpoint.open(sound(kind))
    assert ck.config == config_of(kind)
    assert (ck.dialect, ck.notices) == ("official", [])
    assert len(ck.shards) > 1
    assert_same_weights(ck.load(), weights_of(kind))


def test_tensors_lists_the_inventory_as_stored(sound) -> None:
    ck = Checkpoint.open(sound("base_f32"))
    listed = {name: spec.dtype for name, spec, _ in ck.tensors()}
    assert list(listed) == list(tensor_specs(ck.config))
    assert listed["layers.0.attn.wq_a.scale"] == "F32"
    assert len(listed) == ck.num_tensors
    assert {file for _, _, file in ck.tensors()} == set(ck.shards)
    stored = sum((ck.folder / s).stat().st_size for s in ck.shards)
    assert 0 < ck.num_bytes < stored


def test_golden_equals_the_safetensors_library() -> None:
    ck = Checkpoint.open(GOLDEN)
    assert any("golden_exact.safetensors" in notice for notice in ck.notices)
    weights = ck.load()
    seen = set()
    for shard in ck.shards:
        with safe_open(GOLDEN / shard, framework="pt") as file:
            theirs = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seen |= set(theirs)
        ours = {n: x for p, w in weights.items() for n, x in stored_parts(p, w).items()}
        assert all(same_bits(ours[name], x) for name, x in theirs.items())
    assert len(seen) == ck.num_tensors == 596
    assert ck.verify(deep=True) == []


def test_our_files_are_read_by_the_safetensors_library(sound) -> None:
    weights = weights_of("nvfp4")
    want = {n: x for p, w in weights.items() for n, x in stored_parts(p, w).items()}
    num = 0
    for path in sound("nvfp4").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert same_bits(file.get_tensor(name), want[name])
                num += 1
    assert num == len(want)


def test_single_file_without_index(tmp_path: Path) -> None:
    config, weights = config_of("official"), weights_of("official")
    write_checkpoint(tmp_path, config, weights)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    ck = Checkpoint.open(tmp_path)
    assert ck.shards == ("model.safetensors",)
    assert_same_weights(ck.load(), weights)


def nvfp4_shapes(folder: Path, change) -> None:
    """Rewrite the only shard, every NVFP4 scalar passed through `change(name, entry)`."""
    path = folder / "model-00001-of-00001.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith(("weight_scale_2", "input_scale")):
            change(name, entry)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_nvfp4_scalars_may_have_one_dim(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, config_of("nvfp4"), weights_of("nvfp4"))
    nvfp4_shapes(tmp_path, lambda name, entry: entry.update(shape=[1]))
    ck = Checkpoint.open(tmp_path)
    assert_same_weights(ck.load(), weights_of("nvfp4"))
    assert ck.verify(deep=True) == []
    nvfp4_shapes(tmp_path, lambda name, entry: entry.update(shape=[1, 1]))
    with pytest.raises(CheckpointError, match="shape"):
        Checkpoint.open(tmp_path)


def test_nvfp4_input_scales_are_there_for_all_matrices_or_none(tmp_path: Path) -> None:
    weights = weights_of("nvfp4")
    names = [n for n, w in weights.items() if getattr(w, "input_scale", None) is not None]
    bare = weights | {n: replace(weights[n], input_scale=None) for n in names}
    write_checkpoint(tmp_path, config_of("nvfp4"), bare)
    ck = Checkpoint.open(tmp_path)
    assert_same_weights(ck.load(), bare)
    assert ck.verify(deep=True) == []
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "one", config_of("nvfp4"), bare | {names[0]: weights[names[0]]})
    assert {p.kind for p in caught.value.problems} == {"missing"}
    assert len(caught.value.problems) == len(names) - 1


def test_mtp_experts_of_an_nvfp4_file_may_be_nvfp4(tmp_path: Path) -> None:
    config, weights = config_of("nvfp4"), weights_of("nvfp4")
    rng = torch.Generator().manual_seed(3)
    name = "mtp.0.ffn.experts.2.w1.weight"
    assert weights[name].format.name == "mxfp4"
    weights[name] = random_block_scaled(NVFP4, weights[name].shape, rng)
    write_checkpoint(tmp_path, config, weights)
    got = Checkpoint.open(tmp_path).load()
    assert got[name].format is NVFP4
    assert_same_weights(got, weights)


def test_formats_are_the_shared_objects(sound) -> None:
    weights = Checkpoint.open(sound("base_f32")).load()
    formats = [w.format for w in weights.values() if isinstance(w, BlockScaledTensor)]
    assert formats
    assert all(f is FORMATS[f.name] for f in formats)


def test_dspark_stages_are_skipped_with_a_notice(copy_of) -> None:
    folder = copy_of("no_mtp")
    for stage in range(3):
        add_tensor(f"mtp.{stage}.norm.weight")(folder)
    add_tensor("mtp.2.markov_head.markov_w1.weight")(folder)
    ratios = [*config_of("no_mtp").compress_ratios, 0, 0, 0]
    set_config(
        dspark_block_size=5, dspark_markov_rank=256, dspark_noise_token_id=9,
        dspark_target_layer_ids=[1, 2, 3], num_nextn_predict_layers=1, compress_ratios=ratios,
    )(folder)  # fmt: skip
    ck = Checkpoint.open(folder)
    assert ck.notices == ["DSpark draft stages skipped: 4 tensors"]
    assert ck.config.dspark_block_size == 5
    assert_same_weights(ck.load(), weights_of("no_mtp"))


def test_unknown_config_keys_leave_a_notice(copy_of) -> None:
    folder = copy_of("official")
    set_config(vision_n_layers=3, auto_map={"AutoConfig": "evil.Config"})(folder)
    assert Checkpoint.open(folder).notices == ["config.json: key vision_n_layers not understood"]


def test_keep_loads_a_part(sound) -> None:
    want = {n: w for n, w in weights_of("official").items() if n.startswith("layers.1.")}
    got = Checkpoint.open(sound("official")).load(keep=lambda name: name.startswith("layers.1."))
    assert_same_weights(got, want)


def test_progress_counts_every_byte(sound) -> None:
    ck = Checkpoint.open(sound("official"))
    calls: list[tuple[int, int, int, int]] = []
    ck.load(progress=lambda *call: calls.append(call))
    done, total, shard, num = zip(*calls, strict=True)
    assert list(done) == sorted(set(done))
    assert (done[-1], set(total)) == (ck.num_bytes, {ck.num_bytes})
    assert sorted(set(shard)) == list(range(len(ck.shards)))
    assert set(num) == {len(ck.shards)}


def test_too_little_memory_is_refused_before_the_first_read(sound) -> None:
    calls: list[object] = []
    ck = Checkpoint.open(sound("official"), memory=lambda: 1_000_000)
    with pytest.raises(CapacityError) as caught:
        ck.load(progress=lambda *call: calls.append(call))
    assert (caught.value.needed, caught.value.free) == (ck.num_bytes, 1_000_000)
    assert calls == []
    Checkpoint.open(sound("official"), memory=lambda: ck.num_bytes).load()


def test_free_memory_is_plausible() -> None:
    assert 1 << 26 < free_memory() < 1 << 46


# ---- writer


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_writing_is_deterministic_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config, weights = config_of("official"), weights_of("official")
    write_checkpoint(tmp_path / "a", config, weights, SHARD_BYTES, generation_config={"top_p": 1})
    backwards = dict(reversed(weights.items()))
    write_checkpoint(tmp_path / "b", config, backwards, SHARD_BYTES, generation_config={"top_p": 1})
    files = tree(tmp_path / "a")
    assert files == tree(tmp_path / "b")
    assert json.loads(files["generation_config.json"]) == {"top_p": 1}
    assert not [name for name in files if name.startswith(".")]
    shards = [len(body) for name, body in files.items() if name.endswith(".safetensors")]
    largest = max(x.nbytes for x in weights.values())
    assert max(shards) <= max(SHARD_BYTES, largest) + 40_000  # the header


def test_pairs_are_written_as_they_come(tmp_path: Path) -> None:
    config, weights = config_of("official"), weights_of("official")
    write_checkpoint(tmp_path, config, iter(weights.items()), SHARD_BYTES)
    assert_same_weights(Checkpoint.open(tmp_path).load(), weights)


def test_tensors_are_aligned_in_the_file(sound) -> None:
    folder = sound("official")
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        widths = {"I64": 8, "F32": 4, "BF16": 2}
        for name, entry in header.items():
            if name != "__metadata__":
                begin = 8 + length + entry["data_offsets"][0]
                assert begin % widths.get(entry["dtype"], 1) == 0


def test_an_existing_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    config = config_of("official")
    write_checkpoint(tmp_path, config, weights_of("official"), SHARD_BYTES)
    before = tree(tmp_path)
    small = replace(config, num_nextn_predict_layers=0)
    weights = random_weights(small, seed=1)
    with pytest.raises(CheckpointError, match="already holds") as caught:
        write_checkpoint(tmp_path, small, weights)
    assert caught.value.kind == "exists"
    assert tree(tmp_path) == before
    (tmp_path / "README.md").write_text("keep me")
    write_checkpoint(tmp_path, small, weights, overwrite=True)
    assert_same_weights(Checkpoint.open(tmp_path).load(), weights)
    assert set(tree(tmp_path)) == {
        "README.md", "config.json", "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "tensor"),
    [
        (lambda w: w.pop("norm.weight"), "missing", "norm.weight"),
        (lambda w: w.update(extra=torch.zeros(2)), "unexpected", "extra"),
        (lambda w: w.update({"norm.weight": torch.ones(128)}), "dtype", "norm.weight"),
        (lambda w: w.update({"norm.weight": torch.ones(64).bfloat16()}), "shape", "norm.weight"),
        (lambda w: w.update({"norm.weight": torch.ones(128) * 1j}), "dtype", "norm.weight"),
    ],
)
def test_wrong_weights_are_not_written(change, kind: str, tensor: str, tmp_path: Path) -> None:
    weights = weights_of("official")
    change(weights)
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path, config_of("official"), weights)
    assert {p.kind for p in caught.value.problems} == {kind}
    assert {p.tensor for p in caught.value.problems} == {tensor}
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("part", ["scale", "norm"])
def test_official_fp4_files_have_one_dtype_each(part: str, tmp_path: Path) -> None:
    """F32 scales are for -Base, F32 norms for transformers: consistent is not enough."""
    scale_dtype = "F32" if part == "scale" else "F8_E8M0"
    weights = random_weights(config_of("official"), fp8_scale_dtype=scale_dtype)
    if part == "norm":
        weights = {n: w.float() if "norm.weight" in n else w for n, w in weights.items()}
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path, config_of("official"), weights)
    wrong = [p.tensor for p in caught.value.problems if p.kind == "dtype"]
    assert len(wrong) == len(caught.value.problems) > 20
    assert all(part in name for name in wrong)


def test_a_parameter_given_twice_is_refused(tmp_path: Path) -> None:
    weights = weights_of("official")
    pairs = [*weights.items(), ("norm.weight", weights["norm.weight"])]
    with pytest.raises(CheckpointError, match="duplicate") as caught:
        write_checkpoint(tmp_path, config_of("official"), iter(pairs), SHARD_BYTES)
    assert caught.value.kind == "duplicate"
    assert tree(tmp_path) == {}


def test_a_target_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="not a folder"):
        write_checkpoint(tmp_path / "file", config_of("official"), weights_of("official"))


@pytest.mark.parametrize(
    "name", [".shard-0.part", ".config.json.part", ".model.safetensors.index.json.part",
             "config.json", "model.safetensors.index.json", "generation_config.json",
             "model-00001-of-00001.safetensors"],
)  # fmt: skip
def test_links_in_the_target_are_not_written_through(name: str, tmp_path: Path) -> None:
    folder, victim = tmp_path / "m", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    (folder / name).symlink_to(victim)
    write_checkpoint(
        folder, config_of("official"), weights_of("official"), overwrite=True,
        generation_config={"eos_token_id": 1},
    )  # fmt: skip
    assert victim.read_text() == "precious"
    assert not (folder / name).is_symlink() or name.endswith(".part")
    assert_same_weights(Checkpoint.open(folder).load(), weights_of("official"))


def test_leftovers_of_the_old_checkpoint_go_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, config_of("official"), weights_of("official"), SHARD_BYTES,
        generation_config={"eos_token_id": 1},
    )  # fmt: skip
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_checkpoint(tmp_path, config_of("official"), weights_of("official"), overwrite=True)
    assert set(tree(tmp_path)) == {
        "tokenizer.json", "config.json", "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }  # fmt: skip


def test_a_write_that_stops_half_way_never_looks_complete(tmp_path: Path, monkeypatch) -> None:
    """Old and new have the same tensors in files of the same names: a mixture would open."""
    config, real, counts = config_of("official"), os.replace, []
    for limit in range(50):
        folder = tmp_path / str(limit)
        write_checkpoint(folder, config, random_weights(config, seed=1), SHARD_BYTES)
        calls = 0

        def stopping(a, b, limit=limit) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise OSError(5, "Input/output error")
            real(a, b)

        monkeypatch.setattr(os, "replace", stopping)
        error = None
        try:
            write_checkpoint(folder, config, weights_of("official"), SHARD_BYTES, overwrite=True)
        except CheckpointError as e:
            error = e
        monkeypatch.setattr(os, "replace", real)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        if error is None:
            break
        assert error.kind == "write"
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)
        counts.append(limit)
    assert len(counts) > 5
    assert_same_weights(Checkpoint.open(folder).load(), weights_of("official"))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    config, weights = config_of("official"), weights_of("official")
    write_checkpoint(tmp_path, config, weights, SHARD_BYTES)
    before = tree(tmp_path)

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_checkpoint(tmp_path, config, weights, SHARD_BYTES, overwrite=True)
    assert caught.value.kind == "write"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("linear", "expert"), [("bfloat16", "float32"), ("bfloat16", "mxfp4"), ("fp8", "bfloat16")]
)
def test_a_config_that_config_json_cannot_express_is_refused(
    linear: str, expert: str, tmp_path: Path
) -> None:
    config = tiny_config(linear_format=linear, expert_format=expert)
    with pytest.raises(ConfigError, match="expert_format"):
        write_checkpoint(tmp_path, config, random_weights(config))


def test_shard_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes"):
        write_checkpoint(tmp_path, config_of("official"), {}, max_shard_bytes=0)


# ---- sha256 manifest


def manifest_of(folder: Path, path: Path) -> Path:
    """A manifest as sha256sum writes it."""
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n"
        for p in sorted(folder.glob("*.safetensors"))
    ]
    path.write_text("".join(lines))
    return path


def test_sha256_manifest(copy_of, tmp_path: Path) -> None:
    folder = copy_of("official")
    manifest = manifest_of(folder, tmp_path / "SHA256SUMS")
    ck = Checkpoint.open(folder)
    assert ck.verify(sha256=manifest) == []
    path = shard_path(folder, 1)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    manifest.write_text("\n".join(manifest.read_text().splitlines()[1:]))
    problems = Checkpoint.open(folder).verify(sha256=manifest)
    assert [(p.kind, p.file[:11]) for p in problems] == [
        ("sha256", "model-00001"), ("sha256", "model-00002"),
    ]  # fmt: skip
    assert "does not name" in problems[0].detail


def test_sha256_covers_every_file_it_names(copy_of, tmp_path: Path) -> None:
    folder = copy_of("official")
    (folder / "more").mkdir()
    (folder / "more" / "text").write_text("x")
    names = [*sorted(p.name for p in folder.iterdir() if p.is_file()), "more/text"]
    manifest = folder / "SUMS"
    digests = [hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names]
    lines = [f"{d}  ./{n}\n" for d, n in zip(digests, names, strict=True)]
    # `sha256sum * > SUMS` lists the list itself, as it was: empty
    manifest.write_text("".join(lines) + f"{'e' * 64}  SUMS\n")
    ck = Checkpoint.open(folder)
    assert ck.verify(sha256=manifest) == []
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    (folder / "more" / "text").write_text("y")
    problems = ck.verify(sha256=manifest)
    assert [(p.kind, p.file) for p in problems] == [
        ("sha256", "config.json"), ("sha256", "more/text"),
    ]  # fmt: skip
    (folder / "config.json").unlink()
    (problem, *_) = ck.verify(sha256=manifest)
    assert (problem.kind, problem.file) == ("missing_file", "config.json")
    assert problem.fix == "download it into this folder"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "more/../../secret", "link/secret",
                                  "secret_link", "fifo", "more"])  # fmt: skip
def test_sha256_reads_nothing_from_outside(name: str, copy_of, tmp_path: Path) -> None:
    folder = copy_of("official")
    (folder / "more").mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to(tmp_path)
    (folder / "secret_link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    manifest = manifest_of(folder, tmp_path / "SUMS")
    digest = hashlib.sha256(b"x").hexdigest()
    manifest.write_text(manifest.read_text() + f"{digest}  {name}\n")
    (problem,) = Checkpoint.open(folder).verify(sha256=manifest)
    assert problem.kind in ("path", "file_type")


@pytest.mark.parametrize("text", ["not a manifest\n", "\x00\xff", "zz" * 32 + "  a.safetensors"])
def test_a_bad_manifest_is_named(text: str, sound, tmp_path: Path) -> None:
    path = tmp_path / "SUMS"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="SUMS") as caught:
        Checkpoint.open(sound("official")).verify(sha256=path)
    assert caught.value.kind == "sha256"
    with pytest.raises(CheckpointError):
        Checkpoint.open(sound("official")).verify(sha256=tmp_path / "absent")


# ---- tiny models


def test_tiny_model_has_every_mechanism() -> None:
    config = tiny_config()
    assert set(config.compress_ratios) == {0, 4, 128}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    names = list(tensor_specs(config))
    for part in ("indexer", "compressor", "tid2eid", "gate.bias", "mtp.0.", "shared_experts"):
        assert any(part in name for name in names)


@pytest.mark.parametrize("kind", CONFIGS)
def test_random_weights_are_well_scaled_and_repeatable(kind: str) -> None:
    weights = weights_of(kind)
    assert_same_weights(weights_of(kind), weights)
    ids = weights["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == ids.shape[1] for row in ids.tolist())
    other = random_weights(config_of(kind), seed=8)
    assert not torch.equal(other["embed.weight"], weights["embed.weight"])
    x = weights["layers.1.attn.compressor.wkv.weight"].float()
    assert 0.9 < float(x.std()) * x.shape[1] ** 0.5 < 1.1
