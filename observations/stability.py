"""How many warm-up prompts are needed: `python observations/stability.py --model smollm2`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.observe import observation_main

    sys.exit(observation_main("stability"))
