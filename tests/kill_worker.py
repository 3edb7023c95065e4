"""Runs one configuration in a child of its own each time it is told to; kills it, too.

A line of its input is `[results_dir, seconds until SIGKILL or null]`.

Forking after the imports makes a fresh process cost milliseconds instead of seconds, and a SIGKILL
hits a real process with real files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    for line in sys.stdin:
        results, kill_after = json.loads(line)
        child = os.fork()
        if child == 0:
            run(RunConfig.from_dict({**settings, "results_dir": results}))
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # not waited for yet: it cannot be another process
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
