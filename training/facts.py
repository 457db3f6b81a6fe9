"""The reviewed table of countries: read, checked, frozen to dsv4/nano/facts.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from training.paths import FACTS_TABLE, NANO

AS_OF = "2026-01-01"
CONTINENTS = ("Africa", "Asia", "Europe", "North America", "Oceania", "South America")
SOURCE = (
    "Compiled by hand for dsv4-nano; started from the npm package country-json 2.3.0 (MIT) and "
    "The World Factbook (public domain), every row reviewed and corrected."
)
RULES = (
    "Scope: the 193 member states of the United Nations except Nauru, which has no official "
    "capital. Common short English names, accents dropped.",
    "Continents follow the UN M49 scheme (so Cyprus, Georgia, Armenia, Azerbaijan, Kazakhstan and "
    "Turkey are in Asia, Russia in Europe, Egypt in Africa); the Americas are split, with Central "
    "America and the Caribbean in North America.",
    "Several seats of government: Benin Porto-Novo, Bolivia Sucre, Eswatini Mbabane, the Ivory "
    "Coast Yamoussoukro, Malaysia Kuala Lumpur, the Netherlands Amsterdam, South Africa Pretoria, "
    "Sri Lanka Sri Jayawardenepura Kotte, Tanzania Dodoma.",
    "Israel: Jerusalem is the capital under its own law; its status is disputed.",
    "Recent changes taken in: Burundi Gitega (2019), Kazakhstan Astana (renamed 2022), Croatia "
    "euro (2023), Zimbabwe gold (2024), Bulgaria euro (2026). Indonesia is Jakarta and Equatorial "
    "Guinea Malabo as of the date of this table.",
    "Language is given only where one language is plainly the main or only official one.",
)


@dataclass(frozen=True)
class Country:
    """One row; `name` carries its article ("the Netherlands"), `language` may be None."""

    name: str
    capital: str
    currency: str
    continent: str
    language: str | None

    @property
    def title(self) -> str:
        """The name at the start of a sentence."""
        return self.name[:1].upper() + self.name[1:]


def load_countries(path: Path = FACTS_TABLE) -> list[Country]:
    """Read the table. Raises ValueError for a duplicate, an empty cell or an unknown continent."""
    rows = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("#"):
            continue
        cells = line.split("\t")
        if len(cells) != 5 or any(not c or c != c.strip() for c in cells):
            raise ValueError(f"facts: expected 5 clean cells, got {cells}")
        name, capital, currency, continent, language = cells
        if continent not in CONTINENTS:
            raise ValueError(f"facts: {name}: expected one of {CONTINENTS}, got {continent!r}")
        rows.append(
            Country(name, capital, currency, continent, None if language == "-" else language)
        )
    for field in ("name", "capital"):
        values = [getattr(r, field) for r in rows]
        if len(set(values)) != len(values):
            raise ValueError(f"facts: duplicate {field}")
    return rows


def write_facts_json(countries: list[Country], path: Path = NANO / "facts.json") -> None:
    """Freeze the table, with its source, date and rules, for the gates."""
    fields = ("name", "capital", "currency", "continent", "language")
    rows = [{f: getattr(c, f) for f in fields if getattr(c, f)} for c in countries]
    head = {"source": SOURCE, "as_of": AS_OF, "rules": list(RULES)}
    body = ",\n".join("    " + json.dumps(row) for row in rows)
    text = json.dumps(head, indent=2)[:-2] + ',\n  "countries": [\n' + body + "\n  ]\n}\n"
    path.write_text(text, encoding="ascii")
