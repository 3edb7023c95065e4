"""The prefill experiment: `python prefill/run_llama.py --policy EE --skip_full_layer_num 4`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.waiting import wait_briefly

if __name__ == "__main__":
    wait_briefly()  # before torch is loaded
    from adaskip.cli.run import run_main

    sys.exit(run_main("prefill", "llama"))
