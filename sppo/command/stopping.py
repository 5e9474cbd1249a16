"""How work ends before it is done: by a request to stop in an orderly way, or where it computes for too long.

The request is a file that somebody, or a cluster's batch script, puts there.

Signals do not reach the processes of other machines; a file on the shared disk does. `SPPO_STOP` names it: the drivers
set it to <run_dir>/stop. Where it is there, shards end with their journals, and training saves a checkpoint at the step
that it is in. The same command goes on from there; it takes the file away first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sppo.command.errors import SPPOError

VARIABLE = "SPPO_STOP"
_SECONDS = 0.5  # between two looks for the file


def may_stop() -> bool:
    """Whether there is a file to look for: the same on all ranks of a training."""
    return bool(os.environ.get(VARIABLE))


def stop_asked() -> bool:
    """Whether somebody has asked this run to stop."""
    return may_stop() and Path(os.environ[VARIABLE]).exists()


def end_if_asked() -> None:
    """Raise KeyboardInterrupt where somebody has asked this run to stop; to call where what is done is kept."""
    if stop_asked():
        raise KeyboardInterrupt


@contextmanager
def heard() -> Iterator[None]:
    """Raise KeyboardInterrupt as soon as somebody asks this run to stop: for loading, which has nothing to keep.

    A thread looks for the request, and hands it to this process's main thread as a SIGTERM (see errors.run_main).
    """
    end_if_asked()
    is_over = threading.Event()
    main = threading.main_thread().ident
    assert main is not None  # it has started

    def look() -> None:
        while not is_over.wait(_SECONDS):
            if stop_asked():
                signal.pthread_kill(main, signal.SIGTERM)
                return

    if may_stop():
        threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextmanager
def time_limit(seconds: float, failure: str) -> Iterator[None]:
    """Raise SPPOError(failure) where this process computes for so long: for what a user or a model brings to be run.

    The time is this process's own computing, so a machine that is busy or asleep does not matter. Python gives signals
    to the main thread only; in another thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: object) -> None:
        raise SPPOError(failure)

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
