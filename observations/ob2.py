"""Observation 2, attention against FFN: `python observations/ob2.py --model smollm2`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.observing.cli import observation_main

if __name__ == "__main__":
    sys.exit(observation_main("ob2"))
