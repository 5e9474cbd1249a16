"""How every command ends: one error type, one place that turns it into an exit code."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Callable

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


class SPPOError(Exception):
    """A failure that the user can act on. The message says what to do; no traceback is shown."""


class UsageError(SPPOError):
    """Wrong flags, an unknown key, a value out of range: exit code 2."""


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave with 0 (done), 1 (failed), 2 (wrong use) or 130 (interrupted).

    SIGTERM is taken as an interruption, so `finally` blocks run. Anything that is not an SPPOError is a
    bug or the machine's trouble: its traceback is shown.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = main() or DONE
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        code = WRONG_USE
    except SPPOError as error:
        print(f"error: {error}", file=sys.stderr)
        code = FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}: the disk is full; make room and run the same command to go on", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command to go on", file=sys.stderr)
        code = INTERRUPTED
    sys.stdout.flush()
    sys.exit(code)
