"""A needle's heat map: `needle_heatmap.py --model smollm2 --policy ADA --skip_sub_layer_num 8`."""

import sys
from pathlib import Path

# A checkout that is not installed must find the package, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adaskip.cli.starting import begin

if __name__ == "__main__":
    begin()  # before torch is loaded
    from adaskip.cli.needle import needle_main

    sys.exit(needle_main())
