"""Where Python looks for modules: in our library and in what the user names, never unasked in the current directory."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def search_path() -> dict[str, str]:
    """The environment in which a Python process finds our library, and runs no file that only lies where it starts.

    `python -m` looks into the current directory first, and an empty entry of PYTHONPATH means that directory too.
    """
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys([str(ROOT), *named])), "PYTHONSAFEPATH": "1"}
