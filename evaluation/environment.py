"""Where figures were found: the device, the packages, and how torch computes there.

For evaluation/attack.py and for all that keep figures, which state it beside them.
"""

import multiprocessing
import platform
import re
from pathlib import Path

import numpy as np
import pyautoattack
import torch


def device_name(device: torch.device) -> str:
    """A device as its maker calls it; of a CPU the number of its cores, too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    return f"{found[1] if found else platform.machine()}, {multiprocessing.cpu_count()} cores"


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "pyautoattack": pyautoattack.__version__,
    }


def make_reproducible() -> None:
    """The same figures again on the same machine, and logits in float32 where a GPU would round to TF32."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
