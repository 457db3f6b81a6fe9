"""Kernels of the decode path that start while others run: all wait, and touch nothing before that.

Read from the sources and from how they are launched, since the interpreter runs one after another.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4.kernels

FOLDER = Path(dsv4.kernels.__file__).parent
FAMILIES = "moe", "router", "sampling"
FILES = [
    path
    for path in (*FOLDER.glob("*/*.py"), FOLDER / "common" / "expert_lists.py")
    if path.parent.name in FAMILIES or path.stem == "expert_lists"
]
READS_WEIGHTS = {"router_topk_kernel"}  # before they wait
LAUNCHES = """
import aot
found, wrong = aot.kernels(), set()
for name, args in aot.aot_calls().items():
    for module in found[name.partition("/")[0]]:
        if module.__name__.split(".")[2] in FAMILIES and not hasattr(module, "sources"):
            for ast, options in aot.device_calls(module, args):
                wrong |= set() if options.get("launch_pdl") else {ast.fn.__name__}
print(sorted(wrong))
"""


def device_functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        is_kernel = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if is_kernel and any("jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_program_waits_before_it_reads_or_writes(path: Path) -> None:
    for function in device_functions(path):
        steps = [ast.unparse(s) for s in function.body]
        steps = steps[1:] if steps[0].startswith(("'", '"')) else steps  # the docstring
        assert steps[0] == "let_next_start()", function.name
        assert steps.count("wait_for_previous()") == 1, function.name
        before = set().union(
            *map(called, map(ast.parse, steps[: steps.index("wait_for_previous()")]))
        )
        allowed = {"tl.load"} if function.name in READS_WEIGHTS else set()
        assert not before & ({"tl.load", "tl.store", "tl.atomic_add"} - allowed), function.name


def test_every_launch_may_overlap() -> None:
    tools = str(Path(__file__).parents[2] / "tools")
    script = f"import sys; sys.path.insert(0, {tools!r}); FAMILIES = {FAMILIES!r}\n{LAUNCHES}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
