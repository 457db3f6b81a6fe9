"""The table of limits: which rule holds for which tap."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsv4.core.errors import RequestError

DEFAULT = Path(__file__).with_name("limits.toml")
KINDS = ("float", "set", "bitwise")
SCHEMA = 1


@dataclass(frozen=True)
class Limit:
    """One rule; see limits.toml for the meaning of its fields."""

    tap: str
    kind: str = "float"
    axes: tuple[str, ...] = ()
    by_ids: str = ""
    float64: float = 0.0
    float32: float = 0.0
    bfloat16: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError("limits.kind", f"one of {KINDS}", self.kind)
        for name in ("float64", "float32", "bfloat16"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise RequestError(f"limits.{name} of {self.tap!r}", "a number from 0", value)

    def of(self, dtype: str) -> float:
        """The limit for runs in `dtype`."""
        return getattr(self, dtype)


class Limits:
    """The rules of one table, in order."""

    def __init__(self, rules: tuple[Limit, ...]) -> None:
        self.rules = rules

    @classmethod
    def load(cls, path: str | Path = DEFAULT) -> Limits:
        """Read a table. Raises RequestError when it cannot be read or has an unknown key."""
        try:
            raw = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise RequestError("limits", f"a TOML table at {path}", str(e)[:200]) from e
        if raw.get("schema") != SCHEMA or not isinstance(raw.get("limit"), list):
            raise RequestError("limits", f"schema = {SCHEMA} and [[limit]] rules", sorted(raw))
        return cls(tuple(_rule(r) for r in raw["limit"]))

    def rule(self, name: str) -> Limit:
        """The first rule that matches tap `name`. Raises RequestError when none does."""
        for rule in self.rules:
            if fnmatchcase(name, rule.tap):
                return rule
        raise RequestError("limits", "a rule for every tap", name, "add a rule with tap = '*'")


BITWISE = Limits((Limit("*", "bitwise"),))  # no tap may differ in any bit


def _rule(raw: dict[str, Any]) -> Limit:
    unknown = set(raw) - set(Limit.__dataclass_fields__)
    texts = (raw.get("tap"), raw.get("by_ids", ""), *raw.get("axes", ()))
    if unknown or not all(isinstance(x, str) for x in texts):
        raise RequestError("limits", "rules with 'tap' and known keys", sorted(raw))
    values: dict[str, Any] = raw | {"axes": tuple(raw.get("axes", ()))}
    return Limit(**values)
