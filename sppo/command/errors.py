"""How every command ends: the error that a user can act on, and the one place that turns errors into exit codes."""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from pathlib import Path

from sppo.command.console import use_console
from sppo.command.importing import is_installed
from sppo.command.search_path import ROOT, search_path

_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "the disk is full; make room and run the same command to go on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "see to its permissions, or name another path"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a directory should be; name another path"),
    errno.EISDIR: "a directory stands where a file should be; name another path",
    errno.ENAMETOOLONG: "name a shorter path",
}
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
OLDEST_PYTHON = (3, 11)
PARENT = "SPPO_PARENT"  # set by scripts/env.sh: the bash script that starts this one
RUN = "SPPO_RUN"  # set by run.sh: a push that fails does not end a run
CHILD = "SPPO_CHILD"  # set by generate.sh, pipeline.sh and evaluation/answers.py for what they start


NO_OVERWRITE = "SPPO_NO_OVERWRITE"  # set by commands without that flag, for the messages of what they start


class SPPOError(Exception):
    """A failure that the user can act on. The message says what to do; no traceback is shown."""


class OtherWorkError(SPPOError):
    """What is here was made under other inputs or settings, and is kept. `found`: what it is.

    `advice`: what to do, where it is not the usual: another directory, or the command's --overwrite where it has one.
    """

    def __init__(self, found: str, advice: str = "") -> None:
        usual = "Use another --output_dir or --run_dir to keep both, or --overwrite to make it again."
        if NO_OVERWRITE in os.environ:
            usual = (
                "Use another --run_dir to keep both, go on with the settings that it was made under, or move away what "
                "is named here to make it again."
            )
        super().__init__(f"{found}\n{advice or usual}")


class UsageError(SPPOError):
    """Wrong flags, an unknown key, a value out of range: exit code 2."""


# What a user's function, or the Python file of a model, may raise. sys.exit() in it is no Exception: it would end a
# command whose work is not done, and with 0 as if it were.
FOREIGN = (Exception, SystemExit)


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line: enough for a message of ours."""
    said = next(iter(str(error).strip().splitlines()), "")
    return "it calls sys.exit" if isinstance(error, SystemExit) else said or type(error).__name__


def with_code_hint(error: BaseException) -> str:
    """first_line, and how to run a model's own Python code where transformers misses it."""
    hint = "; --trust_remote_code runs the code that comes with it" if "trust_remote_code" in str(error) else ""
    return first_line(error) + hint


def cause_line(error: BaseException) -> str:
    """first_line of what `datasets` met, where it wraps that in an exception of its own."""
    from datasets.exceptions import DatasetsError

    return first_line(error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error)


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Let the kernel end this process when its parent dies, so that none is left holding a GPU (on Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signum)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's on a GPU or a CPU, or Python's own. Does not import torch."""
    kind, text = type(error).__name__, str(error)
    return kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text or "std::bad_alloc" in text


def leave(code: int) -> typing.NoReturn:
    """End this process now: run the exit handlers, but do not wait for threads that libraries have started.

    Nor for the interpreter to take all modules apart, which is a second where torch and transformers are among them.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _terminated(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _use_venv(trouble: str) -> int:
    """Start this command again with .venv's Python where there is one; else say what to install."""
    venv = ROOT / ".venv"
    python = venv / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != venv.resolve():
        print(f"{sys.executable} {trouble}; going on with {python}", file=sys.stderr, flush=True)
        os.execv(python, [str(python), *getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]])  # noqa: S606
    print(
        f"error: {sys.executable} {trouble}. Run `bash {ROOT / 'scripts/install.sh'}`, and start this with {python}",
        file=sys.stderr,
    )
    return FAILED


def _lacks(package: str) -> int:
    """A Python without torch and transformers gives way to .venv's. Any other is told what to install into it."""
    if not (is_installed("torch") or is_installed("transformers")):
        return _use_venv(f"lacks the package {package}")
    # the user has chosen this Python and its versions: another would have others
    print(
        f"error: {sys.executable} lacks the package {package}. `{sys.executable} -m pip install -e {ROOT}` installs "
        "what is missing there",
        file=sys.stderr,
    )
    return FAILED


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's main and leave with 0 (done), 1 (failed), 2 (wrong use) or 130 (interrupted).

    A Python that is too old, or has neither torch nor transformers, gives way to .venv's. SIGTERM is taken as an
    interruption, so `finally` blocks run. Anything that is not an SPPOError is a bug or the machine's trouble: its
    traceback is shown. What a script of ours started dies with it; what a user started outlives the shell.
    """
    use_console()
    os.environ.update(search_path())  # for all that this command starts
    if CHILD in os.environ:
        die_with_parent()
    parent = os.environ.pop(PARENT, "")
    if parent and os.getppid() != int(parent):  # it was killed before it could be heard of
        os._exit(INTERRUPTED)
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(_use_venv("is too old: Python {}.{} or newer is needed".format(*OLDEST_PYTHON)))
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = main() or DONE
    except ModuleNotFoundError as error:
        package = (error.name or "sppo").partition(".")[0]
        if package == "sppo":
            raise
        code = _lacks(package)
    except SPPOError as error:
        told = " (This command has no --overwrite: move away what is named here, or use another --run_dir.)"
        has_none = NO_OVERWRITE in os.environ and re.search("(pass|rank.py) --overwrite", str(error))
        print(f"error: {error}{told if has_none else ''}", file=sys.stderr)
        code = WRONG_USE if isinstance(error, UsageError) else FAILED
    except OSError as error:
        if error.errno not in _ADVICE:
            raise
        print(f"error: {error}: {_ADVICE[error.errno]}", file=sys.stderr)
        code = FAILED
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            f"error: out of memory ({first_line(error)}). What was finished is kept. Free the GPU or the machine, or "
            "ask for less: --batch_size in training, --batch_tokens in ranking, --gpu_memory_utilization or --maxlen "
            "in generation; then run the same command to go on",
            file=sys.stderr,
        )
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; run the same command to go on", file=sys.stderr)
        code = INTERRUPTED
    leave(code)
