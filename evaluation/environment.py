"""Where figures were found: the device, the packages, and how torch computes there.

For evaluation/attack.py and for all that keep figures, which state it beside them.
"""

import platform

import numpy as np
import pyautoattack
import torch


def device_name(device: torch.device) -> str:
    """A device as people know it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


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
