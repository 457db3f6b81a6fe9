"""Matches the tensors of the files against those the config asks for, strictly both ways."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from dsv4.core.config import ModelConfig
from dsv4.core.errors import CheckpointError, CheckpointProblem
from dsv4.core.formats import FP8_BLOCK128, MXFP4, NVFP4
from dsv4.core.inventory import TensorSpec, tensor_specs
from dsv4.loader.folder import CONFIG_FILE
from dsv4.loader.header import MAX_TENSORS, StoredTensor
from dsv4.loader.names import stacked_experts, to_official
from dsv4.loader.problems import limited

_PLAIN_FLOATS = ("BF16", "F32")
_INPUT_SCALE = ".input_scale"
_WRONG_MODEL = "config.json and the shards are of different models, or a shard is; download again"


@dataclass(frozen=True)
class Source:
    """Where the bytes of one official tensor are: part `index` of `count` equal parts.

    `spec` has the dtype that is really stored. Parts other than 0 of 1 come from the stacked
    expert tensors of transformers, whose parts are contiguous.
    """

    spec: TensorSpec
    stored: StoredTensor
    index: int = 0
    count: int = 1


@dataclass(frozen=True)
class Match:
    """The outcome: sources by official name in inventory order, and everything that is wrong."""

    config: ModelConfig
    dialect: str
    sources: dict[str, Source]
    problems: list[CheckpointProblem]
    notices: list[str]


def match_tensors(
    config: ModelConfig, stored: Mapping[str, StoredTensor], dialect: str | None = None
) -> Match:
    """Find every tensor of `config` among those stored.

    dialect  whose names to expect, "official" or "transformers"; None: decide by the names

    MTP blocks that transformers dropped are taken out of the returned config; DSpark stages are
    skipped. Both leave a notice. The activation scales of an NVFP4 file are there for all of its
    matrices or for none.
    Problem kinds: "missing", "unexpected", "duplicate", "dtype", "shape".
    """
    _check_count(config)
    dialect = dialect or detect_dialect(stored)
    notices: list[str] = []
    kept, config = _drop_draft_stages(config, stored, dialect, notices)
    expected = tensor_specs(config)
    if config.expert_format == "nvfp4":
        expected = dict(_follow_stored_mtp_format(expected, kept))
        if not any(name.endswith(_INPUT_SCALE) for name in kept):
            expected = {n: s for n, s in expected.items() if not n.endswith(_INPUT_SCALE)}
    named, unexpected, problems = _official_names(config, kept, expected, dialect)
    problems += limited(_unexpected(t, config) for t in unexpected)
    problems += limited(_missing(s, stored) for name, s in expected.items() if name not in named)
    sources: dict[str, Source] = {}
    problems += limited(_compare_all(expected, named, config, dialect, sources))
    problems += limited(_mixed_dtypes(sources))
    return Match(config, dialect, sources, problems, notices)


def detect_dialect(names: Iterable[str]) -> str:
    """Whose names most of the tensors have: "official" or "transformers"."""
    num_prefixed = num = 0
    for name in names:
        num += 1
        num_prefixed += name.startswith("model.")
    return "transformers" if 2 * num_prefixed > num else "official"


def _check_count(c: ModelConfig) -> None:
    """Refuse a config whose inventory alone would fill the memory."""
    blocks = c.num_hidden_layers + c.num_nextn_predict_layers
    count = blocks * c.n_routed_experts * 3
    if count > MAX_TENSORS:
        detail = f"asks for {count:,} expert matrices, at most {MAX_TENSORS:,} tensors are read"
        fix = "correct num_hidden_layers or n_routed_experts"
        raise CheckpointError("too_large", CONFIG_FILE, "", detail, fix)


def _drop_draft_stages(
    config: ModelConfig, stored: Mapping[str, StoredTensor], dialect: str, notices: list[str]
) -> tuple[dict[str, StoredTensor], ModelConfig]:
    drafts = {n for n in stored if n.startswith("mtp.") and re.match(r"mtp\.\d{1,2}\.", n)}
    if config.dspark_block_size:
        if drafts:
            notices.append(f"DSpark draft stages skipped: {len(drafts):,} tensors")
        return {name: t for name, t in stored.items() if name not in drafts}, config
    if dialect == "transformers" and config.num_nextn_predict_layers and not drafts:
        notices.append("no MTP block: transformers does not save it")
        config = replace(config, num_nextn_predict_layers=0)
    return dict(stored), config


def _follow_stored_mtp_format(
    expected: Mapping[str, TensorSpec], stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[str, TensorSpec]]:
    """MTP experts of an NVFP4 file are MXFP4 or NVFP4, matrix by matrix: take what is there."""
    for name, spec in expected.items():
        weight = stored.get(spec.parameter)
        if spec.format is not MXFP4 or weight is None or weight.dtype != NVFP4.value_dtype:
            yield name, spec
        elif name == spec.parameter:
            out, packed = spec.shape
            shape = (out, packed * MXFP4.per_byte)
            base = name.removesuffix(".weight")
            scale_shape = NVFP4.scale_shape(shape)
            for s in (
                TensorSpec(name, NVFP4.value_dtype, NVFP4.payload_shape(shape), name, NVFP4),
                TensorSpec(f"{base}.weight_scale", NVFP4.scale_dtype, scale_shape, name, NVFP4),
                TensorSpec(f"{base}.weight_scale_2", "F32", (), name, NVFP4),
                TensorSpec(f"{base}.input_scale", "F32", (), name, NVFP4),
            ):
                yield s.name, s


_Part = tuple[StoredTensor, int, int]


def _official_names(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, TensorSpec],
    dialect: str,
) -> tuple[dict[str, _Part], list[StoredTensor], list[CheckpointProblem]]:
    """Stored tensors by official name, those that have none here, and names given twice."""
    named: dict[str, _Part] = {}
    unexpected: list[StoredTensor] = []
    problems: list[CheckpointProblem] = []
    if dialect == "official":
        named = {name: (t, 0, 1) for name, t in stored.items() if name in expected}
        return named, [t for name, t in stored.items() if name not in expected], []
    for name, t in stored.items():
        officials = stacked_experts(name, config.n_routed_experts) or (to_official(name),)
        if any(x not in expected for x in officials):
            unexpected.append(t)
            continue
        twins = {named[x][0].name: x for x in officials if x in named}
        for twin, official in twins.items():
            detail = f"holds {official}, and so does {twin}"
            problems.append(_problem("duplicate", t, detail, "keep one of the two"))
        for index, official in enumerate(officials):
            named.setdefault(str(official), (t, index, len(officials)))
    return named, unexpected, problems


def _compare_all(
    expected: Mapping[str, TensorSpec],
    named: Mapping[str, _Part],
    config: ModelConfig,
    dialect: str,
    sources: dict[str, Source],
) -> Iterator[CheckpointProblem]:
    """Fill `sources`; yield what is wrong with the others."""
    for name, spec in expected.items():
        if name in named:
            found = _compare(spec, named[name], config, dialect)
            if isinstance(found, Source):
                sources[name] = found
            else:
                yield from found


def _compare(
    spec: TensorSpec, part: _Part, config: ModelConfig, dialect: str
) -> Source | list[CheckpointProblem]:
    stored, index, count = part
    problems = []
    legal = _legal_dtypes(spec, config, dialect)
    if stored.dtype not in legal:
        detail = f"expected dtype {' or '.join(legal)}, got {stored.dtype}"
        problems.append(_problem("dtype", stored, detail, _WRONG_MODEL))
    shape = _whole_shape(spec, config, stored, count)
    if stored.shape != shape and not (shape == () and stored.shape == (1,)):
        detail = f"expected shape {list(shape)}, got {list(stored.shape)}"
        problems.append(_problem("shape", stored, detail, _WRONG_MODEL))
    if problems:
        return problems if index == 0 else []  # one stacked tensor, one report
    return Source(replace(spec, dtype=stored.dtype), stored, index, count)


def _whole_shape(
    spec: TensorSpec, config: ModelConfig, stored: StoredTensor, count: int
) -> tuple[int, ...]:
    """The shape to be stored: of the tensor itself, or of the stack it is a part of."""
    if not stacked_experts(stored.name, 1):
        return spec.shape
    experts = config.n_routed_experts
    return (experts, count // experts * spec.shape[0], *spec.shape[1:])


def _legal_dtypes(spec: TensorSpec, config: ModelConfig, dialect: str) -> tuple[str, ...]:
    """Official FP4 files are exact; the others vary in the dtype of plain tensors and scales."""
    is_loose = dialect == "transformers" or config.linear_format != "fp8"
    if spec.format is None and spec.dtype in _PLAIN_FLOATS and is_loose:
        return _PLAIN_FLOATS
    is_scale = spec.name != spec.parameter
    may_be_f32 = dialect == "transformers" or config.expert_format == "fp8"
    if spec.format is FP8_BLOCK128 and is_scale and may_be_f32:
        return (spec.dtype, "F32")  # sources differ on what -Base stores
    return (spec.dtype,)


def _mixed_dtypes(sources: Mapping[str, Source]) -> Iterator[CheckpointProblem]:
    """The same tensor of two layers or experts must have the same dtype, whatever it is."""
    groups: defaultdict[str, list[Source]] = defaultdict(list)
    for name, source in sources.items():
        if not name.startswith("mtp."):
            groups[re.sub(r"\.\d+\.", ".*.", name)].append(source)
    for group in groups.values():
        counts = Counter(s.spec.dtype for s in group)
        if len(counts) == 1:
            continue
        usual = counts.most_common(1)[0][0]
        for s in group:
            if s.spec.dtype != usual:
                detail = f"expected dtype {usual} as in the other layers, got {s.spec.dtype}"
                yield _problem("dtype", s.stored, detail, _WRONG_MODEL)


def _problem(kind: str, t: StoredTensor, detail: str, fix: str) -> CheckpointProblem:
    return CheckpointProblem(kind, t.file, t.name, detail, fix)


def _unexpected(t: StoredTensor, config: ModelConfig) -> CheckpointProblem:
    detail = f"not a tensor of this model: {t.dtype} {list(t.shape)}"
    fix = _WRONG_MODEL
    if t.name.startswith("mtp.") and not config.dspark_block_size:
        fix = "config.json has no dspark_block_size or too few num_nextn_predict_layers; fetch both"
    return _problem("unexpected", t, detail, fix)


def _missing(spec: TensorSpec, stored: Mapping[str, StoredTensor]) -> CheckpointProblem:
    detail = f"expected {spec.dtype} {list(spec.shape)}, in none of the files"
    fix = "a shard is missing or incomplete, or config.json is of another model; download again"
    sibling = stored.get(spec.parameter)
    file = sibling.file if sibling is not None else ""
    return CheckpointProblem("missing", file, spec.name, detail, fix)
