"""Methods at equal measured time: `leaderboard.py`; `--parts times` wants a quiet machine."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.leaderboard import leaderboard_main

    sys.exit(leaderboard_main())
