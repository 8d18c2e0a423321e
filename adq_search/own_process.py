"""What a process that does nothing but train for us sets up first: threads and memory.

By glibc's defaults freed activations go back to the system and are faulted in again at the next
step, up to 3,000 page faults a step on `mnist5k` (`results/trials_per_hour`).
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

import torch

#: By parameter of glibc's `mallopt` (its malloc.h): the size in bytes from which it asks the system
#: for each allocation apart, how much free memory it keeps, and how much more it asks for.
_THRESHOLDS: Final = {-3: 2**30, -1: 2**30, -2: 2**26}
#: Who sets one of these has chosen.
_CHOICES: Final = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


def set_up_process(threads: int) -> None:
    """Make this process one that trains: call it before anything is trained.

    Args:
        threads: Of torch's operations.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Have the allocator keep what is freed for the next allocations of this process.

    Returns:
        Whether it does: glibc's allocator, where no environment variable tells it something.
    """
    if any(name in os.environ for name in _CHOICES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(parameter, size) == 1 for parameter, size in _THRESHOLDS.items()
    )
