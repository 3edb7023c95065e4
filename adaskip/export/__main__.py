"""`python -m adaskip.export`: a plan as a checkpoint; see docs/EXPORT.md."""

import sys

from adaskip.waiting import wait_briefly

if __name__ == "__main__":
    wait_briefly()  # before torch is loaded
    from adaskip.export.command_line import EXPORT

    sys.exit(EXPORT.main(prog="python -m adaskip.export"))
