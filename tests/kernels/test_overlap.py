"""Kernels launched before the one ahead is done: all wait, and touch nothing before but weights.

Read from the sources and from how they are launched, since the interpreter runs one after another.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import dsv4.kernels

FOLDER = Path(dsv4.kernels.__file__).parent
# What a kernel may read before it waits: weights, which no kernel of a step writes.
WEIGHTS = {
    "rms_norm_kernel": {"weight_ptr"},
    "latent_kv_norm_pack_kernel": {"q_norm_ptr", "kv_norm_ptr"},
    "router_topk_kernel": {"bias_ptr"},
    "finish_kernel": {"scale_ptr", "base_ptr"},
}
# The kernel of the queries, just ahead, waits before it lets this one start: all that was written
# before the queries is there.
WRITTEN_BEFORE_QUERIES = {
    "indexer_scores_topk_kernel": {"slot_ptr", "position_ptr", "pages_ptr", "table_ptr"},
}
EARLY = WEIGHTS | WRITTEN_BEFORE_QUERIES
# So do the routers, ahead of the experts' kernel in CUDA C++.
ORDERS = {
    "indexer_query_kernel": ["wait", "trigger"], "router_topk_kernel": ["wait", "trigger"],
    "router_hash_kernel": ["wait", "trigger"], "maps_kernel": ["wait"],
}  # fmt: skip
ALL_OVERLAP = {"moe", "router", "sampling"}  # families without a kernel that is launched normally
WAITS = {"wait_for_previous", "tl.extra.cuda.gdc_wait"}
TRIGGERS = {"let_next_start", "tl.extra.cuda.gdc_launch_dependents"}
READS, WRITES = {"load"}, re.compile(r"store|atomic_\w+|inline_asm_elementwise|make_\w+|gdc_\w+")
BUILTINS = {"range", "min", "max", "len"}
LAUNCHES = """
import json, aot
found, launched = aot.kernels(), set()
for name, args in aot.aot_calls().items():
    for module in found[name.partition("/")[0]]:
        if not hasattr(module, "sources"):
            for source, options in aot.device_calls(module, args):
                function = source.fn
                overlaps = bool(options.get("launch_pdl"))
                launched.add((function.__module__, function.__name__, overlaps))
print(json.dumps(sorted(launched)))
"""


OWNERS: dict[int, str] = {}  # module of a device function, by its id()


@cache
def functions(module: str) -> dict[str, ast.FunctionDef]:
    """Device functions that a module can call, by the name it calls them; imported ones too."""
    path = FOLDER.joinpath(*module.split(".")[2:]).with_suffix(".py")
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(path.read_text()).body if path.is_file() else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv4.kernels."):
            there = functions(str(node.module))
            for name in node.names:
                own = name.asname or name.name
                inside = functions(f"{node.module}.{name.name}")  # if it is a module
                found |= {f"{own}.{n}": function for n, function in inside.items()}
                found |= {own: there[name.name]} if name.name in there else {}
        elif isinstance(node, ast.FunctionDef) and any(
            ast.unparse(d).startswith("triton.jit") for d in node.decorator_list
        ):
            found[node.name] = node
            OWNERS[id(node)] = module
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call))


def touches(name: str, module: str) -> set[str]:
    """What a call does with memory: "read", "write"."""
    if name in functions(module):
        function = functions(module)[name]
        return set().union(*(touches(n, OWNERS[id(function)]) for n, _ in calls(function)))
    _, dot, last = name.rpartition(".")
    if not dot and name not in BUILTINS:
        return {"read", "write"}  # who knows
    return {"read"} if last in READS else {"write"} if WRITES.fullmatch(last) else set()


class Walk:
    """All paths through a kernel: what it touches before it waits, and where it does not wait."""

    def __init__(self, module: str, kernel: ast.FunctionDef) -> None:
        self.module = module
        self.wrong: list[str] = []
        self.early: set[str] = set()  # arguments read before the wait
        self.order: list[str] = []
        self.origins = {a.arg: {a.arg} for a in kernel.args.args if a.arg.endswith("_ptr")}
        self.constants = {a.arg for a in kernel.args.args if a.annotation}
        if not self.block(kernel.body, False):
            self.wrong.append("ends without having waited")

    def block(self, steps: Iterable[ast.stmt], waited: bool) -> bool:
        """Whether the kernel has waited behind `steps`, on every path."""
        for step in steps:
            waited = self.step(step, waited)
        return waited

    def step(self, step: ast.stmt, waited: bool) -> bool:
        match step:
            case ast.If(test=ast.Name(id="PDL"), body=body):
                return self.block(body, waited)
            case ast.If(test=test, body=body, orelse=other):
                self.touch(test, waited)
                ends = [self.block(branch, waited) for branch in (body, other)]
                return all(ends)
            case ast.For(target=target, iter=steps, body=body):
                self.touch(steps, waited)
                self.assign([target], steps)
                end = self.block(body, waited)
                # A constant number of times is at least once.
                is_constant = (
                    isinstance(steps, ast.Call)
                    and ast.unparse(steps.func) == "range"
                    and {ast.unparse(a) for a in steps.args} <= self.constants
                )
                return end if is_constant else waited
            case ast.While(test=test, body=body):
                self.touch(test, waited)
                self.block(body, waited)
                return waited
            case ast.Expr(value=ast.Call(func=func)) if ast.unparse(func) in WAITS | TRIGGERS:
                kind = "wait" if ast.unparse(func) in WAITS else "trigger"
                self.order += [] if kind in self.order else [kind]
                return waited or kind == "wait"
        self.touch(step, waited)
        match step:
            case ast.Assign(targets=targets, value=value):
                self.assign(targets, value)
            case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
                self.assign([target], step.value)
            case ast.Return():
                if not waited:
                    self.wrong.append(f"line {step.lineno}: returns without having waited")
                return True
        return waited

    def origin(self, value: ast.AST | None) -> set[str]:
        """Pointer arguments that a value is made of."""
        names = [n.id for n in ast.walk(value or ast.Pass()) if isinstance(n, ast.Name)]
        return set().union(*(self.origins.get(name, set()) for name in names))

    def assign(self, targets: list[ast.expr], value: ast.AST | None) -> None:
        origin = self.origin(value)  # besides that of another value: a name may have several
        for target in targets:
            for name in (n.id for n in ast.walk(target) if isinstance(n, ast.Name)):
                self.origins[name] = origin | self.origins.get(name, set())

    def touch(self, tree: ast.AST, waited: bool) -> None:
        """Note what an expression does with memory, unless the kernel has waited."""
        for name, call in () if waited else calls(tree):
            does = touches(name, self.module)
            origin = set().union(*map(self.origin, call.args), *map(self.origin, call.keywords))
            if "write" in does or (does and not origin):
                self.wrong.append(f"line {call.lineno}: {name} before the wait")
            self.early |= origin if does else set()


@cache
def launched() -> set[tuple[str, str, bool]]:
    """Module and name of what the launches start, and whether it may overlap."""
    tools = str(Path(__file__).parents[2] / "tools")
    script = f"import sys; sys.path.insert(0, {tools!r})\n{LAUNCHES}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {tuple(row) for row in json.loads(done.stdout)}


def waiting() -> list[tuple[str, str]]:
    """Module and name of every device function that waits."""
    found = []
    for path in sorted(FOLDER.rglob("*.py")):
        module = ".".join(("dsv4", "kernels", *path.relative_to(FOLDER).with_suffix("").parts))
        for name, function in functions(module).items():
            is_own = OWNERS[id(function)] == module and not module.endswith("common.pdl")
            if is_own and any(called in WAITS for called, _ in calls(function)):
                found.append((module, name))
    return found


def test_those_that_wait_are_those_launched_to_overlap() -> None:
    assert set(waiting()) == {(module, name) for module, name, overlaps in launched() if overlaps}
    normal = {(m, name) for m, name, overlaps in launched() if not overlaps}
    assert not [row for row in normal if row[0].split(".")[2] in ALL_OVERLAP]


@pytest.mark.parametrize(("module", "name"), waiting())
def test_a_kernel_waits_on_every_path_before_it_touches_memory(module: str, name: str) -> None:
    walk = Walk(module, functions(module)[name])
    assert walk.wrong == []
    assert walk.early == EARLY.get(name, set())
    assert walk.order == ORDERS.get(name, ["trigger", "wait"])


def test_every_exception_is_of_a_kernel() -> None:
    assert EARLY.keys() | ORDERS.keys() <= {name for _, name in waiting()}
