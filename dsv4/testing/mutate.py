"""Ways to break a checkpoint folder, each named, each with the refusal it must meet.

`MUTATIONS` is a table for a test to walk: copy a sound checkpoint, `apply` one, open and load it.
The files are edited as bytes and JSON here, without the loader under test.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FIRST = "model-00001"  # the shard that most mutations hit, by the start of its name

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8}


@dataclass(frozen=True)
class Mutation:
    """One way to break a checkpoint.

    name    unique
    kind    of the CheckpointProblem that must be reported; "config" for a ConfigError
    where   start of the file name in the problem; for "config" the field
    tensor  in the problem, "" for any
    apply   breaks the folder in place
    stage   "open", "load" or "verify": the first call that must refuse
    base    which sound checkpoint to start from: "official", "base_f32", "nvfp4" or "plain"
    """

    name: str
    kind: str
    where: str
    tensor: str
    apply: Callable[[Path], object]
    stage: str = "open"
    base: str = "official"


def shard_path(folder: Path, index: int = 0) -> Path:
    """The shard number `index` of the folder, from 0."""
    return sorted(folder.glob("model-*.safetensors"))[index]


def find_shard(folder: Path, tensor: str) -> Path:
    """The shard that holds `tensor`, by the index."""
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def split_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_shard(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    """Write a safetensors file; `header` as bytes is written as it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A mutation that changes the value of a JSON file; `change` edits it or returns another."""

    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return apply


def set_config(**fields: Any) -> Callable[[Path], None]:
    """A mutation that sets fields of config.json."""
    return edit_json(CONFIG, lambda raw: raw.update(fields))


def set_shard_name(name: object) -> Callable[[Path], None]:
    """A mutation that makes the index put the first tensor into `name`."""
    return edit_json(
        INDEX, lambda raw: raw["weight_map"].update({next(iter(raw["weight_map"])): name})
    )


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A mutation of the first shard's header; the data stays."""

    def apply(folder: Path) -> None:
        path = shard_path(folder)
        header, data = split_shard(path)
        changed = change(header)
        join_shard(path, header if changed is None else changed, data)

    return apply


def edit_entry(**fields: Any) -> Callable[[Path], None]:
    """A mutation of the header entry of the first tensor of the first shard."""
    return edit_header(lambda header: header[_first(header)].update(fields))


def edit_bytes(tensor: str, change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    """A mutation of the bytes of one tensor, in place."""

    def apply(folder: Path) -> None:
        path = find_shard(folder, tensor)
        header, data = split_shard(path)
        begin, end = header[tensor]["data_offsets"]
        part = bytearray(data[begin:end])
        change(part)
        join_shard(path, header, data[:begin] + bytes(part) + data[end:])

    return apply


def poke(tensor: str, *values: int) -> Callable[[Path], None]:
    """A mutation that overwrites the first bytes of a tensor."""
    return edit_bytes(tensor, lambda b: b.__setitem__(slice(0, len(values)), bytes(values)))


def replace_tensor(
    tensor: str, new_name: str = "", dtype: str = "", shape: list[int] | None = None
) -> Callable[[Path], None]:
    """A mutation that renames, retypes or reshapes one tensor and fills it with zeros."""

    def apply(folder: Path) -> None:
        path = find_shard(folder, tensor)
        header, data = split_shard(path)
        parts: dict[str, tuple[str, list[int], bytes]] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            body, kind, sizes = data[begin:end], entry["dtype"], entry["shape"]
            if name == tensor:
                count = len(body) // _ITEM_BYTES.get(kind, 1)
                kind, sizes = dtype or kind, shape or sizes
                body, name = bytes(count * _ITEM_BYTES.get(kind, 1)), new_name or name
            parts[name] = (kind, sizes, body)
        _write_parts(path, parts)
        if new_name:
            edit_json(INDEX, lambda raw: _rename_key(raw["weight_map"], tensor, new_name))(folder)

    return apply


def add_tensor(name: str, in_index: bool = True) -> Callable[[Path], None]:
    """A mutation that adds one BF16 [4] tensor to the first shard."""

    def apply(folder: Path) -> None:
        path = shard_path(folder)
        header, data = split_shard(path)
        header[name] = {
            "dtype": "BF16", "shape": [4], "data_offsets": [len(data), len(data) + 8],
        }  # fmt: skip
        join_shard(path, header, data + bytes(8))
        if in_index:
            edit_json(INDEX, lambda raw: raw["weight_map"].update({name: path.name}))(folder)

    return apply


def drop_tensors(prefix: str) -> Callable[[Path], None]:
    """A mutation that takes the tensors whose names start with `prefix` out, index included."""

    def apply(folder: Path) -> None:
        for path in sorted(folder.glob("model-*.safetensors")):
            header, data = split_shard(path)
            parts = {
                name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
                for name, e in header.items()
                if name != "__metadata__" and not name.startswith(prefix)
            }
            _write_parts(path, parts)
        edit_json(INDEX, lambda raw: {"weight_map": _without(raw["weight_map"], prefix)})(folder)

    return apply


def _write_parts(path: Path, parts: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, end = {}, 0
    for name, (dtype, shape, body) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(body)]}
        end += len(body)
    join_shard(path, header, b"".join(body for _, _, body in parts.values()))


def _without(mapping: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {k: v for k, v in mapping.items() if not k.startswith(prefix)}


def _rename_key(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


def _first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A mutation of a whole file; the name FIRST means the first shard."""

    def apply(folder: Path) -> None:
        path = shard_path(folder) if name == FIRST else folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def _instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A mutation that puts something else, made by `make`, in the place of a file."""

    def apply(folder: Path) -> None:
        path = shard_path(folder) if name == FIRST else folder / name
        path.rename(folder.parent / f"outside-{path.name}")
        make(path)

    return apply


def _link_outside(path: Path) -> None:
    path.symlink_to(path.parent.parent / f"outside-{path.name}")


def _repeat_key(data: bytes) -> bytes:
    """Repeat the first member of a JSON object."""
    pairs = list(json.loads(data).items())
    first = json.dumps(dict(pairs[:1]))[1:-1]
    return b"{" + first.encode() + b", " + json.dumps(dict(pairs))[1:].encode()


def _repeat_header_key(header: dict[str, Any]) -> bytes:
    return _repeat_key(json.dumps({k: header[k] for k in header if k != "__metadata__"}).encode())


def _share_offsets(header: dict[str, Any]) -> None:
    """Let the second tensor start one element early, and end early too."""
    entries = [e for name, e in header.items() if name != "__metadata__"]
    entries[1]["data_offsets"] = [x - 8 for x in entries[1]["data_offsets"]]


def _copy_into_second_shard(folder: Path) -> None:
    header, data = split_shard(shard_path(folder))
    name = _first(header)
    body = data[slice(*header[name]["data_offsets"])]
    path = shard_path(folder, 1)
    other, other_data = split_shard(path)
    span = [len(other_data), len(other_data) + len(body)]
    other[name] = header[name] | {"data_offsets": span}
    join_shard(path, other, other_data + body)


def _swap_shards_in_index(raw: dict[str, Any]) -> None:
    names = sorted(set(raw["weight_map"].values()))
    first = next(k for k, v in raw["weight_map"].items() if v == names[0])
    raw["weight_map"][first] = names[1]


def _insert_hole(folder: Path) -> None:
    path = shard_path(folder)
    header, data = split_shard(path)
    names = [name for name in header if name != "__metadata__"]
    gap = header[names[0]]["data_offsets"][1]
    for name in names[1:]:
        header[name]["data_offsets"] = [x + 8 for x in header[name]["data_offsets"]]
    join_shard(path, header, data[:gap] + bytes(8) + data[gap:])


def _only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")


def _many_empty_tensors(count: int) -> bytes:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(entry % i for i in range(count)) + "}").encode()


def _long_inventory(folder: Path) -> None:
    set_config(n_routed_experts=4096, num_hidden_layers=400, compress_ratios=[0] * 400)(folder)


_NORM, _HASH = "layers.0.attn_norm.weight", "layers.0.ffn.gate.tid2eid"
_SCALE, _WQ_A = "layers.1.attn.wq_a.scale", "layers.1.attn.wq_a.weight"
_EXPERT = "layers.2.ffn.experts.5.w2"
_MANY_KEYS = {str(i): "model-00001.safetensors" for i in range(310_000)}
_NESTED = b"[" * 200_000

_CONFIG = (
    Mutation("config_missing", "missing_file", CONFIG, "", lambda f: (f / CONFIG).unlink()),
    Mutation("config_fifo", "file_type", CONFIG, "", _instead(CONFIG, os.mkfifo)),
    Mutation("config_folder", "file_type", CONFIG, "", _instead(CONFIG, Path.mkdir)),
    Mutation("config_link_outside", "path", CONFIG, "", _instead(CONFIG, _link_outside)),
    Mutation("config_cut", "json", CONFIG, "", _rewrite(CONFIG, lambda b: b[: len(b) // 2])),
    Mutation("config_empty", "json", CONFIG, "", _rewrite(CONFIG, lambda b: b"")),
    Mutation("config_not_utf8", "json", CONFIG, "", _rewrite(CONFIG, lambda b: b"\xff\xfe" + b)),
    Mutation("config_nan", "json", CONFIG, "", set_config(hc_eps=float("nan"))),
    Mutation("config_long_number", "json", CONFIG, "",
             _rewrite(CONFIG, lambda b: b'{"vocab_size": ' + b"9" * 5000 + b"}")),
    Mutation("config_nested", "json", CONFIG, "", _rewrite(CONFIG, lambda b: _NESTED)),
    Mutation("config_repeated_key", "duplicate", CONFIG, "", _rewrite(CONFIG, _repeat_key)),
    Mutation("config_2_mb", "too_large", CONFIG, "", set_config(note="x" * (2 << 20))),
    Mutation("config_huge_inventory", "too_large", CONFIG, "", _long_inventory),
    Mutation("config_is_list", "config", "config.json", "", edit_json(CONFIG, lambda raw: [raw])),
    Mutation("config_other_model", "config", "model_type", "", set_config(model_type="llama")),
    Mutation("config_no_layers", "config", "num_hidden_layers", "",
             set_config(num_hidden_layers=0)),
    Mutation("config_billion_layers", "config", "num_hidden_layers", "",
             set_config(num_hidden_layers=10**9)),
    Mutation("config_negative_width", "config", "hidden_size", "", set_config(hidden_size=-128)),
    Mutation("config_text_width", "config", "hidden_size", "", set_config(hidden_size="128")),
    Mutation("config_short_ratios", "config", "compress_ratios", "",
             set_config(compress_ratios=[0, 4])),
    Mutation("config_odd_ratio", "config", "compress_ratios", "",
             set_config(compress_ratios=[0, 4, 64, 4, 0])),
    Mutation("config_odd_groups", "config", "o_groups", "", set_config(o_groups=3)),
    Mutation("config_more_experts", "missing", "", "layers.0.ffn.experts.8.w1.weight",
             set_config(n_routed_experts=9)),
    Mutation("config_fewer_experts", "unexpected", FIRST[:6], "layers.0.ffn.experts.7.w1.weight",
             set_config(n_routed_experts=7)),
    Mutation("config_wider", "shape", FIRST[:6], _NORM, set_config(hidden_size=256)),
    Mutation("config_other_format", "dtype", FIRST[:6], f"{_EXPERT}.weight",
             set_config(expert_dtype="fp8")),
)  # fmt: skip

_INDEX = (
    Mutation("index_missing", "missing_file", INDEX, "", lambda f: (f / INDEX).unlink()),
    Mutation("index_link_outside", "path", INDEX, "", _instead(INDEX, _link_outside)),
    Mutation("index_cut", "json", INDEX, "", _rewrite(INDEX, lambda b: b[:-20])),
    Mutation("index_repeated_key", "duplicate", INDEX, "", _rewrite(INDEX, _repeat_key)),
    Mutation("index_is_list", "index", INDEX, "", edit_json(INDEX, lambda raw: [])),
    Mutation("index_no_map", "index", INDEX, "", edit_json(INDEX, lambda raw: {"metadata": {}})),
    Mutation("index_empty_map", "index", INDEX, "",
             edit_json(INDEX, lambda raw: {"weight_map": {}})),
    Mutation("index_map_is_list", "index", INDEX, "",
             edit_json(INDEX, lambda raw: {"weight_map": list(raw["weight_map"])})),
    Mutation("index_shard_is_number", "index", INDEX, "", set_shard_name(7)),
    Mutation("index_shard_is_list", "index", INDEX, "", set_shard_name(["a", "b"])),
    Mutation("index_parent", "path", INDEX, "", set_shard_name("../outside.safetensors")),
    Mutation("index_absolute", "path", INDEX, "", set_shard_name("/etc/passwd")),
    Mutation("index_backslash", "path", INDEX, "", set_shard_name("..\\outside.safetensors")),
    Mutation("index_subfolder", "path", INDEX, "", set_shard_name("a/b.safetensors")),
    Mutation("index_dots", "path", INDEX, "", set_shard_name("..")),
    Mutation("index_nul", "path", INDEX, "", set_shard_name("a\0.safetensors")),
    Mutation("index_escape_code", "path", INDEX, "", set_shard_name("\x1b[2J.safetensors")),
    Mutation("index_long_name", "path", INDEX, "", set_shard_name("a" * 300 + ".safetensors")),
    Mutation("index_pickle", "path", INDEX, "", set_shard_name("pytorch_model.bin")),
    Mutation("index_absent_shard", "missing_file", "other.s", "",
             set_shard_name("other.safetensors")),
    Mutation("index_absent_tensor", "index", FIRST, "layers.0.nothing",
             lambda f: edit_json(INDEX, lambda raw: raw["weight_map"].update(
                 {"layers.0.nothing": shard_path(f).name}))(f)),
    Mutation("index_lacks_tensor", "index", FIRST, "extra", add_tensor("extra", in_index=False)),
    Mutation("index_other_shard", "index", "model-00002", "",
             edit_json(INDEX, _swap_shards_in_index)),
    Mutation("index_many_keys", "too_large", INDEX, "",
             edit_json(INDEX, lambda raw: {"weight_map": _MANY_KEYS})),
    Mutation("index_nested", "too_large", INDEX, "", _rewrite(INDEX, lambda b: _NESTED)),
)  # fmt: skip

_SHARD = (
    Mutation("shard_missing", "missing_file", FIRST, "", lambda f: shard_path(f).unlink()),
    Mutation("shard_fifo", "file_type", FIRST, "", _instead(FIRST, os.mkfifo)),
    Mutation("shard_folder", "file_type", FIRST, "", _instead(FIRST, Path.mkdir)),
    Mutation("shard_link_outside", "path", FIRST, "", _instead(FIRST, _link_outside)),
    Mutation("shard_link_to_device", "path", FIRST, "",
             _instead(FIRST, lambda p: p.symlink_to("/dev/zero"))),
    Mutation("shard_link_loop", "read", FIRST, "", _instead(FIRST, lambda p: p.symlink_to(p))),
    Mutation("shard_link_broken", "missing_file", FIRST, "",
             _instead(FIRST, lambda p: p.symlink_to("nowhere"))),
    Mutation("shard_empty", "truncated", FIRST, "", _rewrite(FIRST, lambda b: b"")),
    Mutation("shard_7_bytes", "truncated", FIRST, "", _rewrite(FIRST, lambda b: b[:7])),
    Mutation("shard_header_cut", "truncated", FIRST, "", _rewrite(FIRST, lambda b: b[:100])),
    Mutation("shard_data_gone", "truncated", FIRST, "",
             _rewrite(FIRST, lambda b: b[: 8 + struct.unpack("<Q", b[:8])[0]])),
    Mutation("shard_1_byte_short", "truncated", FIRST, "", _rewrite(FIRST, lambda b: b[:-1])),
    Mutation("shard_half", "truncated", FIRST, "", _rewrite(FIRST, lambda b: b[: len(b) // 2])),
    Mutation("shard_1_byte_long", "extended", FIRST, "", _rewrite(FIRST, lambda b: b + b"\0")),
    Mutation("shard_twice", "extended", FIRST, "", _rewrite(FIRST, lambda b: b + b)),
    Mutation("shard_length_2_63", "too_large", FIRST, "",
             _rewrite(FIRST, lambda b: struct.pack("<Q", 1 << 63) + b[8:])),
    Mutation("shard_length_200_mb", "too_large", FIRST, "",
             _rewrite(FIRST, lambda b: struct.pack("<Q", 200 << 20) + b[8:])),
    Mutation("shard_is_html", "too_large", FIRST, "",
             _rewrite(FIRST, lambda b: b"<!DOCTYPE html><html>not found</html>" * 10)),
    Mutation("header_not_json", "json", FIRST, "", edit_header(lambda h: b'{"a": }')),
    Mutation("header_not_utf8", "json", FIRST, "", edit_header(lambda h: b'{"\xff": {}}')),
    Mutation("header_blank_first", "header", FIRST, "",
             edit_header(lambda h: b" " + json.dumps(h).encode())),
    Mutation("header_is_list", "header", FIRST, "", edit_header(lambda h: b"[]")),
    Mutation("header_nested", "too_large", FIRST, "",
             edit_header(lambda h: b'{"a":' + b"[" * 700_000)),
    Mutation("header_nested_objects", "json", FIRST, "",
             edit_header(lambda h: b'{"a":' * 200_000)),
    Mutation("header_many_tensors", "too_large", FIRST, "",
             edit_header(lambda h: _many_empty_tensors(310_000))),
    Mutation("header_repeated_key", "duplicate", FIRST, "", edit_header(_repeat_header_key)),
    Mutation("header_no_tensors", "empty", FIRST, "", edit_header(lambda h: {})),
    Mutation("header_metadata_list", "header", FIRST, "",
             edit_header(lambda h: h.update(__metadata__=[1]))),
    Mutation("header_metadata_number", "header", FIRST, "",
             edit_header(lambda h: h.update(__metadata__={"a": 1}))),
    Mutation("header_entry_is_list", "header", FIRST, "",
             edit_header(lambda h: h.update({_first(h): [1]}))),
    Mutation("header_entry_extra", "header", FIRST, "", edit_entry(offset=3)),
    Mutation("header_escape_code", "header", FIRST, "",
             edit_header(lambda h: _rename_key(h, _first(h), "\x1b[2J"))),
    Mutation("header_unknown_dtype", "dtype", FIRST, "", edit_entry(dtype="F8_E3M4")),
    Mutation("header_dtype_number", "dtype", FIRST, "", edit_entry(dtype=4)),
    Mutation("header_negative_dim", "header", FIRST, "", edit_entry(shape=[-1, 4])),
    Mutation("header_float_dim", "header", FIRST, "", edit_entry(shape=[4.0])),
    Mutation("header_shape_overflow", "header", FIRST, "", edit_entry(shape=[1 << 62, 1 << 62])),
    Mutation("header_rank_40", "header", FIRST, "", edit_entry(shape=[1] * 40)),
    Mutation("header_offsets_reversed", "header", FIRST, "", edit_entry(data_offsets=[64, 0])),
    Mutation("header_offsets_bool", "header", FIRST, "", edit_entry(data_offsets=[False, True])),
    Mutation("header_offsets_three", "header", FIRST, "", edit_entry(data_offsets=[0, 1, 2])),
    Mutation("header_offset_past_end", "truncated", FIRST, "",
             edit_entry(dtype="U8", shape=[1 << 40], data_offsets=[0, 1 << 40])),
    Mutation("header_overlap", "overlap", FIRST, "", edit_header(_share_offsets)),
    Mutation("header_hole", "hole", FIRST, "", _insert_hole),
    Mutation("tensor_in_two_shards", "duplicate", "model-00002", "", _copy_into_second_shard),
    Mutation("only_pickle", "format", "pytorch_model.bin", "", _only_pickle),
)  # fmt: skip

_TENSOR = (
    Mutation("tensor_missing", "missing", "", _NORM, drop_tensors(_NORM)),
    Mutation("scale_missing", "missing", FIRST[:6], _SCALE, drop_tensors(_SCALE)),
    Mutation("layer_missing", "missing", "", _HASH, drop_tensors("layers.0.")),
    Mutation("mtp_missing", "missing", "", "mtp.0.enorm.weight", drop_tensors("mtp.")),
    Mutation("tensor_renamed", "unexpected", FIRST[:6], "layers.0.norm0.weight",
             replace_tensor(_NORM, "layers.0.norm0.weight")),
    Mutation("tensor_unexpected", "unexpected", FIRST, "extra", add_tensor("extra")),
    Mutation("layer_unexpected", "unexpected", FIRST, "layers.9.attn_norm.weight",
             add_tensor("layers.9.attn_norm.weight")),
    Mutation("draft_unexpected", "unexpected", FIRST, "mtp.2.norm.weight",
             add_tensor("mtp.2.norm.weight")),
    Mutation("transformers_name", "unexpected", FIRST[:6], f"model.{_NORM}",
             replace_tensor(_NORM, f"model.{_NORM}")),
    Mutation("norm_f32", "dtype", FIRST[:6], _NORM, replace_tensor(_NORM, dtype="F32")),
    Mutation("norm_f16", "dtype", FIRST[:6], _NORM, replace_tensor(_NORM, dtype="F16")),
    Mutation("scale_u8", "dtype", FIRST[:6], _SCALE, replace_tensor(_SCALE, dtype="U8")),
    Mutation("scale_f32", "dtype", FIRST[:6], _SCALE, replace_tensor(_SCALE, dtype="F32")),
    Mutation("fp8_other_kind", "dtype", FIRST[:6], _WQ_A, replace_tensor(_WQ_A, dtype="F8_E5M2")),
    Mutation("expert_u8", "dtype", FIRST[:6], f"{_EXPERT}.weight",
             replace_tensor(f"{_EXPERT}.weight", dtype="U8")),
    Mutation("norm_as_matrix", "shape", FIRST[:6], _NORM, replace_tensor(_NORM, shape=[8, 16])),
    Mutation("expert_transposed", "shape", FIRST[:6], f"{_EXPERT}.weight",
             replace_tensor(f"{_EXPERT}.weight", shape=[64, 128])),
    Mutation("one_norm_f32", "dtype", FIRST[:6], _NORM, replace_tensor(_NORM, dtype="F32"),
             base="plain"),
)  # fmt: skip

_VALUE = (
    Mutation("e8m0_nan", "scale", FIRST[:6], _SCALE, poke(_SCALE, 255), "load"),
    Mutation("e8m0_huge", "scale", FIRST[:6], _SCALE, poke(_SCALE, 254), "load"),
    Mutation("expert_e8m0_nan", "scale", FIRST[:6], f"{_EXPERT}.scale",
             poke(f"{_EXPERT}.scale", 120, 255), "load"),
    Mutation("tid2eid_negative", "value", FIRST[:6], _HASH, poke(_HASH, *[255] * 8), "load"),
    Mutation("tid2eid_past_end", "value", FIRST[:6], _HASH, poke(_HASH, 8), "load"),
    Mutation("tid2eid_repeated", "value", FIRST[:6], _HASH,
             edit_bytes(_HASH, lambda b: b.__setitem__(slice(0, 8), b[8:16])), "load"),
    *(
        Mutation(f"f32_scale_{what}", "scale", FIRST[:6], _SCALE,
                 poke(_SCALE, *struct.pack("<f", value)), "load", "base_f32")
        for what, value in (
            ("zero", 0.0), ("negative", -1.0), ("nan", float("nan")), ("inf", float("inf")),
            ("huge", 2.0**41), ("small", 2.0**-41),
        )
    ),
    Mutation("nvfp4_scale_nan", "scale", FIRST[:6], f"{_EXPERT}.weight_scale",
             poke(f"{_EXPERT}.weight_scale", 0x7F), "load", "nvfp4"),
    Mutation("nvfp4_scale_negative", "scale", FIRST[:6], f"{_EXPERT}.weight_scale",
             poke(f"{_EXPERT}.weight_scale", 0xB8), "load", "nvfp4"),
    *(
        Mutation(f"nvfp4_{scalar}_{what}", "scale", FIRST[:6], f"{_EXPERT}.{scalar}",
                 poke(f"{_EXPERT}.{scalar}", *struct.pack("<f", value)), "load", "nvfp4")
        for scalar in ("weight_scale_2", "input_scale")
        for what, value in (("zero", 0.0), ("nan", float("nan")), ("inf", float("inf")))
    ),
    Mutation("norm_nan", "value", FIRST[:6], _NORM, poke(_NORM, 0xC0, 0x7F), "verify"),
    Mutation("norm_inf", "value", FIRST[:6], _NORM, poke(_NORM, 0x80, 0x7F), "verify"),
    Mutation("sink_nan", "value", FIRST[:6], "layers.0.attn.attn_sink",
             poke("layers.0.attn.attn_sink", 0, 0, 0xC0, 0x7F), "verify"),
    Mutation("fp8_nan", "value", FIRST[:6], _WQ_A, poke(_WQ_A, 0x7F), "verify"),
    Mutation("fp8_minus_nan", "value", FIRST[:6], _WQ_A, poke(_WQ_A, 0, 0xFF), "verify"),
)  # fmt: skip

MUTATIONS: tuple[Mutation, ...] = _CONFIG + _INDEX + _SHARD + _TENSOR + _VALUE
