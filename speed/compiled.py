"""Compiled decoding, dense and under plans: `python speed/compiled.py`; see docs/SPEED.md."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.speed import speed_main
    from adaskip.speedtest.compiled import CompiledDecoding

    sys.exit(speed_main(CompiledDecoding()))
