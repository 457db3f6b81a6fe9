"""`dsv4 doctor`: will this machine run it."""

from __future__ import annotations

import os
import platform
from argparse import ArgumentParser, Namespace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dsv4 import __version__
from dsv4.cli.terminal import Terminal, gib
from dsv4.core import env
from dsv4.core.errors import install_hint

SCHEMA = 1
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "rich")
MIN_TORCH = (2, 11)
EXTRAS = {"chat": "deepseek-recipe", "cuda": "nvidia-cuda-nvrtc", "hf": "transformers"}
OPTIONAL = ("triton",)
SLOWLY = "ok, slowly: TRITON_INTERPRET=1 runs them on the CPU"


def add_arguments(parser: ArgumentParser, defaults: dict[str, Any]) -> None:
    """Flags of the verb."""
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--env", action="store_true", help="list every DSV4_* variable")


def run(args: Namespace, terminal: Terminal) -> int:
    """Exit code: 0 when a tier can run, else 4."""
    report = examine()
    if args.json:
        terminal.json(report)
    else:
        for line in _lines(report, args.env):
            terminal.data(line)
    return 0 if report["tiers"] else 4


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data."""
    packages = {name: _version(name) for name in (*NEEDED, *OPTIONAL, *EXTRAS.values())}
    problems = [f"{name} is not installed" for name in NEEDED if packages[name] is None]
    torch_facts = _torch() if packages["torch"] else {}
    if torch_facts and torch_facts["version_tuple"] < MIN_TORCH:
        problems.append(f"torch {packages['torch']} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}")
    problems += torch_facts.get("problems", [])
    gpus = torch_facts.get("gpus", [])
    checks = {} if problems else _checks(packages) | {"kernels": _kernels(packages, gpus)}
    if checks and gpus:
        checks["cuda c++"] = _cuda_kernels()
    tiers = []
    if not problems and checks["reference"] == "ok":
        tiers.append(1)
        if checks["transformers"] == "ok":
            tiers.insert(0, 0)
        if checks["kernels"] in ("ok", SLOWLY):
            tiers.append(2)
    values = env.read()
    return {
        "schema": SCHEMA,
        "dsv4": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "memory_bytes": _total_memory(),
                "free_bytes": _free_memory()},
        "packages": packages,
        "gpus": gpus,
        "checks": checks,
        "problems": problems,
        "tiers": tiers,
        "env": {name: values[name] for name in env.VARIABLES},
        "unknown_env": env.unknown(),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """What torch says of itself and of the GPUs."""
    try:
        import torch
    except (ImportError, OSError) as e:
        return {"version_tuple": MIN_TORCH, "problems": [f"torch cannot be imported: {e}"]}
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": p.name, "arch": f"sm_{p.major}{p.minor}", "memory_bytes": total,
                     "free_bytes": free})  # fmt: skip
    numbers = torch.__version__.split("+")[0].split(".")[:2]
    return {"version_tuple": tuple(int("".join(filter(str.isdigit, n))) for n in numbers),
            "gpus": gpus, "problems": []}  # fmt: skip


def _checks(packages: dict[str, str | None]) -> dict[str, str]:
    """Try what the tiers need: "ok", or what is wrong."""
    checks = {"reference": _try(_run_reference), "nano": _try(_open_nano)}
    checks["chat"] = _try(_render_chat) if packages["deepseek-recipe"] else "not installed"
    checks["transformers"] = (
        _try(_import_transformers) if packages["transformers"] else "not installed"
    )
    return checks


def _cuda_kernels() -> str:
    """Whether CUDA C++ kernels can be compiled; Triton stands in where they cannot."""
    try:
        from dsv4.kernels.common.cuda import why_not
    except ImportError as error:
        return str(error)
    return why_not() or "ok"


def _kernels(packages: dict[str, str | None], gpus: list[dict[str, Any]]) -> str:
    """The same of the kernels of tier 2, which are compiled for SM 9x and 10x."""
    if packages["triton"] is None:
        return "triton is not installed"
    from dsv4.kernels.common.launch import INTERPRETED

    if INTERPRETED:
        return SLOWLY
    fits = any(gpu["arch"].startswith(("sm_9", "sm_10")) for gpu in gpus)
    return "ok" if fits else "no GPU of SM 9x or 10x; TRITON_INTERPRET=1 runs them on the CPU"


def _try(check: Any) -> str:
    try:
        check()
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:200]}"
    return "ok"


def _run_reference() -> None:
    """One token through a random model of a few thousand parameters."""
    import torch

    from dsv4.reference.model import ReferenceModel
    from dsv4.testing.tiny import random_weights, tiny_config

    config = tiny_config(num_hidden_layers=2, compress_ratios=(0, 4), num_hash_layers=1)
    model = ReferenceModel(config, random_weights(config))
    logits = model.forward(torch.tensor([1, 2, 3, 4, 5]), model.new_cache())
    if not logits.isfinite().all():
        raise ArithmeticError("a random model gave logits that are not finite")


def _open_nano() -> None:
    from dsv4.cli.model import open_tokenizer
    from dsv4.loader import Checkpoint
    from dsv4.nano import path

    open_tokenizer("nano", Checkpoint.open(path()).config)


def _render_chat() -> None:
    from dsv4.text.chat import Message, render_chat

    render_chat([Message("user", "Hello")])


def _import_transformers() -> None:
    from dsv4.cli.tier0 import transformers_config
    from dsv4.testing.tiny import tiny_config

    transformers_config(tiny_config())


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_memory() -> int:
    from dsv4.loader.memory import free_memory

    return free_memory()


def _lines(r: dict[str, Any], with_env: bool) -> list[str]:
    packages = r["packages"]
    named = "  ".join(f"{p} {packages[p]}" for p in (*NEEDED, *OPTIONAL) if packages[p])
    cpu = r["cpu"]
    lines = [
        f"dsv4 {r['dsv4']}  python {r['python']}  {named}",
        f"CPU    {cpu['model']}, {cpu['cores']} cores, {gib(cpu['memory_bytes'])} "
        f"({gib(cpu['free_bytes'])} free)",
    ]
    for i, gpu in enumerate(r["gpus"]):
        lines.append(f"GPU {i}  {gpu['name']}  {gpu['arch']}  {gib(gpu['memory_bytes'])} "
                     f"({gib(gpu['free_bytes'])} free)")  # fmt: skip
    if not r["gpus"]:
        lines.append("GPU    none that torch can use")
    for extra, package in EXTRAS.items():
        state = packages[package] or f"not installed ({install_hint(extra)})"
        lines.append(f"extra  {extra:5} {package} {state}")
    lines += [f"check  {name:12} {result}" for name, result in r["checks"].items()]
    lines += [f"problem  {p}" for p in r["problems"]]
    if with_env:
        lines += [f"env    {n:20} {r['env'][n]!s:10} {v.meaning}" for n, v in env.VARIABLES.items()]
        lines += [f"env    {n:20} unknown{f', did you mean {c}?' if c else ''}"
                  for n, c in r["unknown_env"].items()]  # fmt: skip
    tiers = ", ".join(map(str, r["tiers"]))
    word = "tier" if len(r["tiers"]) == 1 else "tiers"
    slowly = ", 2 slowly" if r["checks"].get("kernels") == SLOWLY else ""
    verdict = f"{word} {tiers} usable{slowly}" if tiers else "nothing can run here"
    lines.append(f"verdict  {verdict}")
    return lines
