"""A prefill by operator: `python speed/profile_prefill.py`; see docs/SPEED.md."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.waiting import wait_passively

if __name__ == "__main__":
    wait_passively()  # before torch is loaded
    from adaskip.speedtest.operator_profile import profile_main

    sys.exit(profile_main())
