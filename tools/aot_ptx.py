"""What is wrong with compiled PTX; part of tools/aot.py."""

import re

REGISTER_PRODUCT = re.compile(r"wgmma\.mma_async\S* \{[^}]*\}, *\{")
WAIT_FOR_ALL = re.compile(r"wgmma\.wait_group\.sync\.aligned 0;")


def problem(assembly: str, options: dict, instruction: str | None) -> str:
    """What is wrong with compiled code, or "".

    instruction  pattern that the code must hold: what the kernel's `tensor_core(arch, args)` gives
    """
    if instruction and not re.search(instruction, assembly):
        return f"holds no {instruction}"
    if not options.get("enable_fp_fusion", True) and re.search(r"\bfma\.rn", assembly):
        return "holds fma although the kernel forbids it"
    if products_run_on(assembly):
        return "holds wgmma on registers that runs on into the next step (fragments.end_step)"
    return ""


def products_run_on(assembly: str) -> bool:
    """Whether a loop of PTX goes round before all its products with operands in registers ended."""
    lines, labels = assembly.splitlines(), dict[str, int]()
    for i, line in enumerate(lines):
        if label := re.match(r"(\$\S+):", line):
            labels[label[1]] = i
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\S+);", line)
        if branch and branch[1] in labels:
            body = lines[labels[branch[1]] : i]
            last = [n for n, x in enumerate(body) if REGISTER_PRODUCT.search(x)][-1:]
            if last and not any(WAIT_FOR_ALL.search(x) for x in body[last[0] :]):
                return True
    return False
