import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsv4.core.config import ModelConfig
from dsv4.core.taps import capture
from dsv4.diff.dump import TapDump
from dsv4.loader import Checkpoint
from dsv4.reference.layer import Layer
from dsv4.reference.model import ReferenceModel
from dsv4.text.tokenizer import Tokenizer

PROMPT = "The capital of France is Paris. Hello, how are you today? " * 4


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


# inspect


def test_inspect_table(dsv4, tiny):
    code, out, _ = dsv4("inspect", tiny)
    assert code == 0
    for line in ("1  CSA            4  hash", "2  HCA          128  score", "0  SWA            -"):
        assert line in out
    assert "I8" in out


def test_inspect_json_counts_every_tensor(dsv4, tiny):
    report = json.loads(dsv4("inspect", tiny, "--json", "--tensors", "*")[1])
    checkpoint = Checkpoint.open(tiny)
    assert report["schema"] == 1
    assert report["num_tensors"] == len(report["tensors"]) == checkpoint.num_tensors
    assert report["num_bytes"] == checkpoint.num_bytes
    assert sum(d["bytes"] for d in report["dtypes"].values()) == checkpoint.num_bytes
    assert [x["attention"] for x in report["layers"]] == ["SWA", "CSA", "HCA", "CSA"]
    assert {x["file"] for x in report["tensors"]} == set(checkpoint.shards)


def test_inspect_tensors_by_glob(dsv4, tiny):
    code, out, err = dsv4("inspect", tiny, "--tensors", "layers.1.attn.wq_a.*")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "layers.1.attn.wq_a.weight", "layers.1.attn.wq_a.scale",
    ]  # fmt: skip
    assert "F8_E4M3" in out
    assert "2 tensors" in err


def test_inspect_of_published_models(dsv4):
    report = json.loads(dsv4("inspect", "flash", "--json")[1])
    assert (report["num_tensors"], report["num_bytes"]) == (69187, 159609485896)
    assert "145,116 tensors, 864,704,792,696 bytes" in dsv4("inspect", "pro")[1]


# verify


def test_verify_of_a_sound_checkpoint(dsv4, tiny):
    for flags in ([], ["--deep"]):
        code, out, _ = dsv4("verify", tiny, *flags)
        assert code == 0
        assert "tensors checked" in out
        assert out.rstrip().endswith("ok")


def test_verify_names_a_truncated_shard(dsv4, copy):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    code, out, _ = dsv4("verify", copy)
    assert code == 3
    assert f"FAIL  truncated  {shard.name}" in out
    assert "fix: " in out
    report = json.loads(dsv4("verify", copy, "--json")[1])
    assert (report["ok"], report["problems"][0]["kind"]) == (False, "truncated")


def test_verify_deep_finds_what_a_plain_one_cannot(dsv4, copy):
    name = "norm.weight"
    file = next(f for n, _, f in Checkpoint.open(copy).tensors() if n == name)
    data = bytearray((copy / file).read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    at = 8 + length + header[name]["data_offsets"][0]
    data[at : at + 2] = b"\xc0\x7f"  # BF16 NaN
    (copy / file).write_bytes(data)
    assert dsv4("verify", copy)[0] == 0
    code, out, _ = dsv4("verify", copy, "--deep")
    assert code == 3
    assert name in out


def test_verify_sha256(dsv4, copy, tmp_path):
    shards = sorted(copy.glob("*.safetensors"))
    lines = [f"{hashlib.sha256(s.read_bytes()).hexdigest()}  {s.name}" for s in shards]
    manifest = tmp_path / "manifest"
    manifest.write_text("\n".join(lines) + "\n")
    assert dsv4("verify", copy, "--sha256", manifest)[0] == 0
    lines[0] = "0" * 64 + lines[0][64:]
    manifest.write_text("\n".join(lines) + "\n")
    code, out, _ = dsv4("verify", copy, "--sha256", manifest)
    assert code == 3
    assert "sha256" in out


def test_verify_checks_the_tokenizer(dsv4, copy):
    (copy / "tokenizer.json").write_text("{")
    code, out, _ = dsv4("verify", copy)
    assert code == 3
    assert "tokenizer.json" in out


def test_verify_of_a_config_that_cannot_be(dsv4, copy):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"hidden_size": -1}))
    code, out, err = dsv4("verify", copy)
    assert (code, out) == (3, "")
    assert "hidden_size" in err


# plan


def test_plan_text_and_exit_code(dsv4):
    command = ("plan", "flash", "--gpus", "2", "--ctx", "131072", "--batch", "4", "--memory")
    code, out, _ = dsv4(*command, "139.8GiB")
    assert code == 0
    assert "148.6 GiB -> 74.9 GiB a GPU" in out
    assert "FITS" in out
    assert "largest context at this batch: 1,048,576 tokens (model limit)" in out
    code, out, _ = dsv4(*command, "60G")
    assert code == 1
    assert "DOES NOT FIT" in out


def test_plan_json_equals_the_planner(dsv4, tiny):
    from dsv4.cache.plan import plan

    code, out, _ = dsv4("plan", tiny, "--ctx", "1000", "--batch", "3", "--index-keys", "mxfp4",
                        "--page-tokens", "128", "--memory", "1G", "--json")  # fmt: skip
    expected = plan(Checkpoint.open(tiny).config, context=1000, batch=3, index_keys="mxfp4",
                    page_tokens=128, memory_bytes=2**30)  # fmt: skip
    report = json.loads(out)
    assert code == 0
    assert report["schema"] == 1
    for name in ("weight_bytes", "kv_bytes", "total_bytes", "fits", "largest_context"):
        assert report[name] == getattr(expected, name)


def test_plan_needs_only_config_json(dsv4, tiny, tmp_path):
    shutil.copy(Path(tiny) / "config.json", tmp_path)
    code, out, _ = dsv4("plan", tmp_path)
    assert code == 0
    assert "--memory" in out  # no memory given and no GPU: no verdict


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000000", 10**6), ("1.5k", 1536), ("141G", 141 * 2**30), ("139.5GiB", 279 * 2**29),
     ("2 TB", 2**41)],
)  # fmt: skip
def test_memory_sizes(text, size):
    from dsv4.cli.plan import memory_size

    assert memory_size(text) == size


@pytest.mark.parametrize(
    "flags", [["--ctx", "0"], ["--gpus", "0"], ["--batch", "0"], ["--page-tokens", "100"],
              ["--memory", "0"], ["--memory", "nanG"]],
)  # fmt: skip
def test_plan_refuses_nonsense(dsv4, flags):
    assert dsv4("plan", "flash", *flags)[0] == 2


# doctor


@pytest.mark.parametrize(
    ("interpreted", "arch", "tiers", "verdict"),
    [
        (True, None, [0, 1, 2], "tiers 0, 1, 2 usable, 2 slowly"),
        (False, None, [0, 1], "tiers 0, 1 usable"),
        (False, "sm_80", [0, 1], "tiers 0, 1 usable"),
        (False, "sm_90", [0, 1, 2], "tiers 0, 1, 2 usable"),
        (False, "sm_100", [0, 1, 2], "tiers 0, 1, 2 usable"),
    ],
)
def test_doctor_knows_where_kernels_run(dsv4, monkeypatch, interpreted, arch, tiers, verdict):
    from dsv4.cli import doctor
    from dsv4.kernels.common import launch

    gpus = [{"name": "one", "arch": arch, "memory_bytes": 1, "free_bytes": 1}] if arch else []
    facts = {"version_tuple": (9, 0), "gpus": gpus}
    monkeypatch.setattr(doctor, "_torch", lambda: facts)
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    monkeypatch.setattr("dsv4.kernels.common.cuda.why_not", lambda: "needs NVRTC")
    report = json.loads(dsv4("doctor", "--json")[1])
    assert report["tiers"] == tiers
    assert report["checks"].get("cuda c++") == ("needs NVRTC" if arch else None)
    assert dsv4("doctor")[1].splitlines()[-1] == f"verdict  {verdict}"


def test_doctor(dsv4, monkeypatch):
    monkeypatch.setattr("dsv4.kernels.common.launch.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = json.loads(dsv4("doctor", "--json")[1])
    assert report["schema"] == 1
    assert report["tiers"] == [0, 1]
    assert report["checks"]["reference"] == report["checks"]["chat"] == "ok"
    assert (
        report["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    )
    monkeypatch.setenv("DSV4_TYPO", "1")
    code, out, _ = dsv4("doctor", "--env")
    assert code == 0
    assert "verdict  tiers 0, 1 usable" in out
    assert "DSV4_MAX_CONTEXT" in out
    assert "DSV4_TYPO" in out


def test_doctor_exits_4_when_nothing_can_run(dsv4, monkeypatch):
    def broken(self, *args):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(Layer, "forward", broken)
    code, out, _ = dsv4("doctor")
    assert code == 4
    assert "RuntimeError: illegal instruction" in out
    assert "nothing can run" in out


def test_doctor_names_missing_packages(dsv4, monkeypatch):
    from dsv4.cli import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "safetensors" else real(p))
    code, out, _ = dsv4("doctor")
    assert code == 4
    assert "problem  safetensors is not installed" in out


def test_doctor_without_extras(dsv4, monkeypatch):
    from dsv4.cli import doctor

    monkeypatch.setattr("dsv4.kernels.common.launch.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = doctor._version
    extras = doctor.EXTRAS.values()
    monkeypatch.setattr(doctor, "_version", lambda p: None if p in extras else real(p))
    code, out, _ = dsv4("doctor")
    assert code == 0
    assert "dsv4-inference[chat]" in out
    assert "tier 1 usable" in out


# dump and diff


@pytest.fixture(scope="module")
def dumps(tiny, tmp_path_factory):
    """Dumps of one prompt: tier 1, tier 1 in chunks, tier 0, tier 1 with a planted bug."""
    from dsv4.cli.main import main

    folder = tmp_path_factory.mktemp("dumps")
    runs = {"one": [], "chunked": ["--chunk", "7"], "zero": ["--tier", "0"]}
    for name, flags in runs.items():
        assert main(["dump", tiny, "-p", PROMPT, "--out", str(folder / name), *flags]) == 0
    with pytest.MonkeyPatch.context() as patch:
        from dsv4.reference import layer

        real = layer.sparse_attn
        patch.setattr(
            layer, "sparse_attn", lambda q, kv, idx, sink, s: real(q, kv, idx, sink - 9, s)
        )
        assert main(["dump", tiny, "-p", PROMPT, "--out", str(folder / "bug")]) == 0
    return folder


def test_dump_holds_the_taps_and_what_made_them(tiny, dumps):
    dump = TapDump(dumps / "one")
    tokenizer = Tokenizer.open(tiny)
    ids = tokenizer.encode_prompt(PROMPT)
    assert dump.info.ids == tuple(ids)
    assert (dump.info.tier, dump.info.dtype, dump.info.quant) == (1, "float32", "")
    c, T = Checkpoint.open(tiny).config, len(ids)
    shapes = {
        "logits": [T, c.vocab_size],
        "layers.0.streams": [T, 4, c.hidden_size],
        "mtp.0.logits": [T - 1, c.vocab_size],
        "layers.1.attn.q": [T, c.num_attention_heads, c.head_dim],
        "layers.1.attn.kv": [T, c.head_dim],
        "layers.1.attn.compressed": [T // 4, c.head_dim],
        "layers.1.attn.indexer.scores": [T, T // 4],
        "layers.1.attn.out": [T, c.hidden_size],
        "layers.3.ffn.router.ids": [T, c.num_experts_per_tok],
        "layers.3.ffn.router.weights": [T, c.num_experts_per_tok],
        "layers.3.ffn.out": [T, c.hidden_size],
        "layers.3.hc_attn.pre": [T, 4],
        "layers.3.hc_ffn.post": [T, 4],
        "layers.3.hc_ffn.comb": [T, 4, 4],
    }
    assert {n: list(dump.tensor(n).shape) for n in shapes} == shapes
    assert dump.tensor("layers.1.attn.indexer.topk").shape[0] == T
    order = [dump.names.index(n) for n in ("layers.0.attn.q", "layers.0.streams",
             "layers.1.attn.q", "layers.3.streams", "logits", "mtp.0.logits")]  # fmt: skip
    assert order == sorted(order)


def test_dump_equals_the_model(tiny, dumps):
    checkpoint = Checkpoint.open(tiny)
    model = ReferenceModel(checkpoint.config, checkpoint.load())
    ids = torch.tensor(Tokenizer.open(tiny).encode_prompt(PROMPT))
    with capture(["*"]):
        cache = model.new_cache()
        streams = model.forward_streams(ids, cache)
        logits = model.logits(streams)
        draft = model.forward_mtp(streams[:-1], ids[1:], cache)
    dump = TapDump(dumps / "one")
    assert torch.equal(dump.tensor("logits"), logits)
    assert torch.equal(dump.tensor("layers.3.streams"), streams)
    assert torch.equal(dump.tensor("mtp.0.logits"), draft)


def test_chunks_change_nothing(dsv4, dumps):
    code, out, _ = dsv4("diff", dumps / "one", dumps / "chunked", "--require-all")
    assert code == 0, out


def test_tier_0_agrees_with_tier_1(dsv4, dumps):
    code, out, _ = dsv4("diff", dumps / "zero", dumps / "one", "--all")
    assert code == 0, out
    for name in ("streams", "logits", "attn.out", "hc_ffn.comb", "ffn.router.ids", "indexer.topk"):
        assert name in out
    assert "only in B: " in out
    assert dsv4("diff", dumps / "zero", dumps / "one", "--require-all")[0] == 1


def test_diff_within_the_limits_is_short(dsv4, dumps):
    code, out, _ = dsv4("diff", dumps / "zero", dumps / "one")
    assert code == 0
    worst, *more, verdict = out.splitlines()
    assert worst.startswith("closest to its limit: ")
    assert verdict.endswith("all within limits")
    assert not any("ffn.router.ids" in line for line in more if not line.startswith("only in"))
    assert len(out.splitlines()) < 6
    code, out, _ = dsv4("diff", dumps / "one", dumps / "one")
    assert code == 0
    assert out.startswith("closest to its limit: every tap is equal\n")
    table = dsv4("diff", dumps / "zero", dumps / "one", "--all")[1]
    assert len(table.splitlines()) > 40
    table = dsv4("diff", dumps / "one", dumps / "bug")[1]
    assert "sub-block" in table  # in full without being asked


def test_a_planted_bug_is_named(dsv4, dumps):
    code, out, _ = dsv4("diff", dumps / "one", dumps / "bug")
    assert code == 1
    assert "first layers.0.attn.out" in out
    assert "everything before it agrees to 0" in out
    report = json.loads(dsv4("diff", dumps / "zero", dumps / "bug", "--json")[1])
    assert report["first_divergence"] == "layers.0.attn.out"


def test_diff_misuse(dsv4, dumps, tmp_path):
    assert dsv4("diff", dumps / "one", tmp_path / "absent")[0] == 2
    assert dsv4("diff", dumps / "one", dumps / "bug", "--taps", "nothing.*")[0] == 2
    assert dsv4("diff", dumps / "one", dumps / "bug", "--limits", tmp_path / "absent")[0] == 2
    assert dsv4("diff", dumps / "one", dumps / "bug", "--taps", "*.attn.q,*.kv")[0] == 1
    assert dsv4("diff", dumps / "one", dumps / "bug", "--taps", "layers.0.attn.q")[0] == 0


def test_dump_of_ids_and_globs(dsv4, tiny, tmp_path):
    (tmp_path / "ids.json").write_text('{"ids": [0, 5, 7]}')
    names = []
    for n, ids in enumerate(("0,5,7", f"@{tmp_path / 'ids.json'}")):
        out = tmp_path / str(n)
        code, *_ = dsv4("dump", tiny, "--ids", ids, "--taps", "logits,*.kv", "--out", out)
        assert code == 0
        names.append(TapDump(out).names)
        assert TapDump(out).info.ids == (0, 5, 7)
    assert names[0] == names[1] == [
        *(f"layers.{j}.attn.kv" for j in range(4)), "logits", "mtp.0.attn.kv",
    ]  # fmt: skip


def test_dump_records_the_simulation(dsv4, tiny, tmp_path):
    dsv4("dump", tiny, "--ids", "0,5,7", "--simulate-kv-quant", "on", "--out", tmp_path / "x")
    assert TapDump(tmp_path / "x").info.quant == "cache"


@pytest.mark.parametrize(
    "flags",
    [["--ids", "0,600"], ["--ids", "x"], ["--ids", "@absent"], ["--ids", "1", "-p", "x"], [],
     ["--ids", "1", "--taps", "nothing"], ["--ids", "1", "--chunk", "0"],
     ["--ids", "1,2,3", "--max-context", "2"], ["--ids", "9" * 23], ["--ids", "9" * 5000],
     ["--ids", "-1"], ["--ids", "@deep"], ["--ids", "@latin1"], ["-p", ""]],
)  # fmt: skip
def test_dump_misuse(dsv4, tiny, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "latin1").write_bytes(b'["\xff"]')
    out = tmp_path / "x"
    code, _, err = dsv4("dump", tiny, *flags, "--out", out)
    if flags == ["-p", ""]:  # begin of sentence alone is a prompt
        assert code == 0
        return
    assert code == 2
    assert err.startswith("error:")
    assert not out.exists()


def test_dump_into_a_folder_that_does_not_exist(dsv4, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4.loader.Checkpoint.load", None)
    assert dsv4("dump", tiny, "--ids", "1", "--out", tmp_path / "no" / "x")[0] == 2


# convert


def test_convert_to_bf16_changes_no_logit(dsv4, tiny, tmp_path):
    out = tmp_path / "bf16"
    assert dsv4("convert", tiny, "--to", "bf16", "--out", out)[0] == 0
    checkpoint = Checkpoint.open(out)
    assert checkpoint.config.expert_format == checkpoint.config.linear_format == "bfloat16"
    for name, folder in (("a", tiny), ("b", out)):
        dsv4("dump", folder, "--ids", "0,5,7,9,11,13", "--taps", "logits", "--out", tmp_path / name)
    a, b = (TapDump(tmp_path / n).tensor("logits") for n in "ab")
    assert torch.equal(a, b)  # scales are powers of two: BF16 holds every value


def test_convert_to_a_slice_runs(dsv4, tiny, tmp_path):
    out = tmp_path / "slice"
    command = ("convert", tiny, "--to", "slice", "--out", out, "--layers", "2", "--experts", "4")
    assert dsv4(*command)[0] == 0
    config = Checkpoint.open(out).config
    assert (config.num_hidden_layers, config.n_routed_experts) == (2, 4)
    assert dsv4("generate", out, "-p", "Hello", "-n", "3")[0] == 0
    assert dsv4(*command)[0] == 3  # it exists
    assert dsv4(*command, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "flags",
    [["--to", "slice"], ["--to", "bf16", "--layers", "2"], ["--to", "slice", "--layers", "0"],
     ["--to", "slice", "--layers", "9"], ["--to", "slice", "--experts", "2"], ["--to", "gguf"]],
)  # fmt: skip
def test_convert_misuse(dsv4, tiny, tmp_path, flags):
    assert dsv4("convert", tiny, "--out", tmp_path / "x", *flags)[0] == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("link", [False, True])
def test_convert_does_not_destroy_its_source(dsv4, copy, tmp_path, link):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    out = copy
    if link:
        out = tmp_path / "link"
        out.symlink_to(copy, target_is_directory=True)
    for flags in (["--to", "bf16"], ["--to", "slice", "--layers", "2"]):
        code, _, err = dsv4("convert", copy, *flags, "--out", out, "--overwrite")
        assert code == 2
        assert "another folder than the source" in err
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_convert_copies_nothing_from_outside(dsv4, copy, tmp_path, name):
    secret, path, out = tmp_path / "secret", copy / name, tmp_path / "out"
    secret.write_text('{"key": "value"}')
    for target in (secret, "/dev/zero"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        code, _, err = dsv4("convert", copy, "--to", "bf16", "--out", out)
        assert code == 3
        assert f"path: {name}" in err
        assert not out.exists()


def test_convert_copies_the_texts_into_files_of_its_own(dsv4, copy, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (copy / "tokenizer_config.json").write_text('{"a": 1}')
    out.mkdir()
    victim.write_text("precious")
    (out / "tokenizer.json").symlink_to(victim)
    assert dsv4("convert", copy, "--to", "bf16", "--out", out, "--overwrite")[0] == 0
    assert victim.read_text() == "precious"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (copy / name).read_bytes()
    assert not (out / "tokenizer.json").is_symlink()
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 7]}
    (copy / "generation_config.json").write_text("[]")
    assert dsv4("convert", copy, "--to", "bf16", "--out", out, "--overwrite")[0] == 3


def test_keys_of_config_json_that_are_not_understood_are_told(dsv4, copy):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"vision_layers": 27, "q\x1b[2J": 1}))
    for verb, *flags in (
        ["inspect"], ["verify"], ["plan", "--memory", "1G"], ["generate", "-p", "x", "-n", "1"],
        ["generate", "-p", "x", "--print-prompt"],
    ):  # fmt: skip
        code, _, err = dsv4(verb, copy, *flags)
        assert code == 0
        assert err.count("note: config.json: key vision_layers not understood") == 1, verb
        assert r"key q\x1b[2J not understood" in err


# chat


@pytest.fixture
def talk(dsv4, tiny, monkeypatch):
    def run(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        return dsv4("chat", tiny, "-n", "4", *flags)

    return run


def test_chat_remembers_and_saves(talk, tmp_path):
    path = tmp_path / "c.json"
    code, out, _ = talk(["Hello", "", "How are you?", f"/save {path}", "/quit", "never sent"])
    assert code == 0
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == "How are you?"
    assert out == f"{messages[1]['content']}\n{messages[3]['content']}\n".translate(
        {c: None for c in range(32) if c not in (9, 10)}
    )


def test_chat_ends_with_the_input(talk):
    assert talk(["Hello"])[0] == 0


def test_chat_commands(talk, tmp_path):
    (tmp_path / "text").write_text("from a file\n", "utf-8")
    path = tmp_path / "c.json"
    code, _, err = talk(
        ["/help", "/think low", "/think much", "/nonsense", "/read /absent", "/stats",
         f"/read {tmp_path / 'text'}", "/stats", f"/save {path}"],
        "--system", "Be brief.",
    )  # fmt: skip
    assert code == 0
    for text in ("/think off|low|high|max", "expected one of off, low, high, max",
                 "one that /help lists", "/absent", "decode 3 tok"):  # fmt: skip
        assert text in err
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages[:2]] == ["Be brief.", "from a file"]
    assert messages[2]["reasoning"]


def test_chat_goes_on_after_a_message_that_is_too_long(talk, tmp_path):
    path = tmp_path / "c.json"
    code, _, err = talk(["x" * 300, "Hi", f"/save {path}"], "--max-context", "40")
    assert code == 0
    assert "error: prompt: expected 1 to 40 tokens" in err
    messages = json.loads(path.read_text("utf-8"))["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hi"]


def test_chat_keeps_the_cache_between_turns(talk, monkeypatch):
    fed = []
    real = ReferenceModel.forward

    def spy(self, ids, cache, last_only=False):
        fed.append(len(ids))
        logits = torch.zeros_like(real(self, ids, cache, last_only))
        # one character, then the end of the answer
        logits[:, self.config.eos_token_id if len(fed) % 2 == 0 else 70] = 1
        return logits

    monkeypatch.setattr(ReferenceModel, "forward", spy)
    assert talk(["Hello there you", "Hi"])[0] == 0
    first, _, second, _ = fed
    assert second < first  # though the second prompt holds the first one


def test_config_of_words():
    from dsv4.cli.model import model_config

    assert model_config("flash") == ModelConfig.flash()
    assert model_config("pro") == ModelConfig.pro()


@pytest.mark.parametrize(("switch", "name"), [("off", "exact"), ("on", "kvquant")])
def test_dump_of_ids_needs_no_tokenizer_and_equals_golden(dsv4, tmp_path, switch, name):
    folder = Path(__file__).parents[1] / "data" / "golden_small"
    want = load_file(folder / f"golden_{name}.safetensors")
    (tmp_path / "ids.json").write_text(json.dumps(want["ids"].tolist()))
    code, _, _ = dsv4(
        "dump", folder, "--ids", f"@{tmp_path / 'ids.json'}", "--taps", "logits,mtp.0.logits",
        "--simulate-kv-quant", switch, "--out", tmp_path / "out.safetensors",
    )  # fmt: skip
    assert code == 0
    got = load_file(tmp_path / "out.safetensors")
    assert [*got] == ["logits", "mtp.0.logits"]
    rows = (got["logits"] - want["logits"]).abs().amax(dim=1) / want["logits"].abs().max()
    assert float((rows < (1e-5 if switch == "off" else 1e-3)).float().mean()) >= 0.7
    assert rows[:100].max() < 1e-5  # no rounding has had time to flip anything
    mtp = (got["mtp.0.logits"][:100:5] - want["mtp_logits"][:20]).abs().max()
    assert mtp / want["mtp_logits"].abs().max() < 1e-5


def test_plan_prints_exact_bytes(dsv4):
    out = dsv4("plan", "flash", "--ctx", "4096")[1]
    assert "159,609,485,896 bytes in the file" in out
    assert "3,850.25 bytes a token" in out
    report = json.loads(dsv4("plan", "flash", "--ctx", "4096", "--json")[1])
    assert (report["weight_file_bytes"], report["kv_growth"]) == (159_609_485_896, 3850.25)
