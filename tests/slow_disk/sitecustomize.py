"""Every Python process with this directory in PYTHONPATH has a slow disk below $SPPO_TEST_SLOW.

A file there takes 0.2 s (or $SPPO_TEST_DELAY) to be renamed or removed, so that what is there only for a moment (a file
about to be renamed, a journal about to go, a checkpoint not yet sealed) lasts long enough for a test to kill in, on
however fast a machine. While the file $SPPO_TEST_HELD is there, what is slow waits for as long as nobody has asked the
run to stop. Below $SPPO_TEST_FULL the disk is full.
"""

import errno
import os
import sys
import time

HELD, STOP = os.environ.get("SPPO_TEST_HELD"), os.environ.get("SPPO_STOP")
SLOW, FULL = os.environ.get("SPPO_TEST_SLOW"), os.environ.get("SPPO_TEST_FULL")


def slow(event: str, args: tuple) -> None:
    if SLOW and event in ("os.rename", "os.remove") and str(args[0]).startswith(SLOW):
        time.sleep(float(os.environ.get("SPPO_TEST_DELAY", 0.2)))
        while HELD and STOP and os.path.exists(HELD) and not os.path.exists(STOP):
            time.sleep(0.2)
    if FULL and event == "open" and str(args[0]).startswith(FULL) and set(str(args[1])) & set("wax+"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))


sys.addaudithook(slow)
