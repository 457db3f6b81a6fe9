"""Fail when a file outgrows its budget of code lines (pyproject.toml), or a function its 50."""

from __future__ import annotations

import ast
import sys
import tokenize
import tomllib
from pathlib import Path

MAX_FUNCTION_LINES = 50
LAYOUT = {tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE}
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER, tokenize.ENCODING} | LAYOUT


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold code: no blanks, comments or docstrings."""
    lines: set[int] = set()
    statement_start = True
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            docstring = statement_start and token.type == tokenize.STRING
            if token.type not in NOT_CODE and not docstring:
                lines.update(range(token.start[0], token.end[0] + 1))
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                statement_start = token.type in LAYOUT
    return lines


def long_functions(path: Path, lines: set[int]) -> list[str]:
    """Functions of `path` with more than MAX_FUNCTION_LINES lines of code."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            n = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            if n > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {n} code lines, limit 50")
    return found


def main() -> int:
    budgets = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["dsv4"]["budget"]
    seen: set[Path] = set()
    over: list[str] = []
    for pattern, limit in budgets.items():
        for path in sorted(set(Path().glob(pattern)) - seen):
            seen.add(path)
            lines = code_lines(path)
            if len(lines) > limit:
                over.append(f"{path}: {len(lines)} code lines, budget {limit}")
            over += long_functions(path, lines)
    print("\n".join(over) or f"line budget: {len(seen)} files within their limits")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
