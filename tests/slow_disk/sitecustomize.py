"""Every Python process with this directory in PYTHONPATH has a slow disk below $SPPO_TEST_SLOW.

A file there takes 0.2 s to be renamed or removed, so that what is there only for a moment (a file about to be renamed,
a journal about to go, a checkpoint not yet sealed) lasts long enough for a test to kill in, on however fast a machine.
"""

import os
import sys
import time


def slow(event: str, args: tuple) -> None:
    if event in ("os.rename", "os.remove") and str(args[0]).startswith(os.environ["SPPO_TEST_SLOW"]):
        time.sleep(0.2)


sys.addaudithook(slow)
