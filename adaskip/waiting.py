"""How OpenMP threads wait, for the commands; nothing here loads torch.

By default a waiting thread spins for some milliseconds. With as many threads as cores and another
busy process, it spins away the time that the thread it waits for needs: everything takes many times
as long. Passive threads sleep.
"""

from __future__ import annotations

import os

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


def wait_passively() -> None:
    """Lets OpenMP's threads sleep while they wait, unless the user has set how they wait.

    For a program's first lines: libgomp reads the environment when torch loads it, and never again.
    Processes that this one starts inherit the setting.
    """
    if SPINS not in os.environ:
        os.environ.setdefault(POLICY, "PASSIVE")
