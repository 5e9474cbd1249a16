"""SPPO: Self-Play Preference Optimization (arXiv 2405.00675), one module a stage.

generation -> ranking -> pairing -> trainer, chained by loop; see README.md.
"""

import os
import sys

__version__ = "0.1.0"


def _forget_unnamed_directories() -> None:
    """Take directories off the module search path that nobody has named, where a file would hide a library.

    They are the current one, put there by `python -m sppo...` or an empty entry of PYTHONPATH, and scripts/ and sppo/,
    put there by `python scripts/x.py`. What a command itself starts: sppo/command/search_path.py.
    """
    here = os.path.dirname(os.path.realpath(__file__))
    root = os.path.dirname(here)
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    unnamed = {here, os.path.join(root, "scripts")}
    if sys.argv[:1] == ["-m"] or ("" in named and len(named) > 1):  # "-m": the module to run is being looked for
        unnamed |= {os.getcwd()} - {root}
    unnamed -= {os.path.abspath(entry) for entry in named if entry}
    sys.path[:] = [entry for entry in sys.path if entry not in unnamed]


_forget_unnamed_directories()
os.environ.setdefault("DO_NOT_TRACK", "1")  # vLLM and huggingface_hub would report what they are used for
