"""`python -m adaskip COMMAND`: the command `adaskip`."""

import sys

from adaskip.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
