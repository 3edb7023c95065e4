"""How OpenMP threads wait, for the commands; nothing here loads torch.

By default a waiting thread spins for some milliseconds. With as many threads as cores and another
busy process, it spins away the time that the thread it waits for needs: everything takes many times
as long. Threads that soon fall asleep leave it to them; those that sleep at once are slower alone.
"""

from __future__ import annotations

import os

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# Of libgomp's 300,000: docs/SPEED.md has what it costs alone, and what it saves beside another.
BRIEFLY = "1000"


def wait_briefly() -> None:
    """Lets OpenMP's threads spin only briefly, unless the user has set how they wait.

    For a program's first lines: libgomp reads the environment when torch loads it, and never again.
    Processes that this one starts inherit the setting.
    """
    if POLICY not in os.environ:
        os.environ.setdefault(SPINS, BRIEFLY)
