"""How much memory a load may take."""

from __future__ import annotations

import os
import re


def free_memory() -> int:
    """Bytes the system can hand out without swapping; where it does not tell, all it has.

    Linux: MemAvailable of /proc/meminfo. Elsewhere: the physical memory.
    """
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="ascii") as file:
            available = re.search(r"^MemAvailable:\s+(\d+) kB$", file.read(), re.MULTILINE)
        if available is not None:
            return int(available[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
