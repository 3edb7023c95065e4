"""Scores every budget of a run: `python eval/eval.py --model llama-EE-PREFILL`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.run import eval_main

    sys.exit(eval_main())
