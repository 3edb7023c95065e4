"""The prefill experiment: `python prefill/run_qwen.py --policy EE --skip_full_layer_num 4`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.run import run_main

    sys.exit(run_main("prefill", "qwen"))
