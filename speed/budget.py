"""Predicted and measured acceleration: `python speed/budget.py`; see docs/SPEED.md."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.speed.budget_check import BUDGET
from adaskip.speed.study import study_main

if __name__ == "__main__":
    sys.exit(study_main(BUDGET))
