"""The imports of torch and transformers, which are most of the time that a short command takes."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys

# transformers imports them where they are installed: for assisted decoding, and for the losses of object detection
_UNUSED = ("sklearn", "scipy")
_NETWORKS = ("torch", "transformers.modeling_utils", "transformers.generation.utils")
TRAINER = "transformers.trainer"  # it imports datasets only to know one when it sees one; ours is none


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A directory of its name on the search path, as wandb makes one for its logs,
    counts for Python as a package without a file, and here as none."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def import_networks(*more: str) -> None:
    """Import torch, what every network of transformers stands on, and `more`: the same in two thirds of the time.

    That is the larger part of a short command. So without packages that nothing here uses through transformers, and
    without the garbage collector, which would walk through all modules again and again; they stay out of its later
    walks too.
    """
    if all(name in sys.modules for name in (*_NETWORKS, *more)):
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        # where transformers is imported in part, it knows already that they are installed
        unused = [] if "transformers" in sys.modules else [*_UNUSED, *["datasets"] * (TRAINER in more)]
        hidden = [name for name in unused if name not in sys.modules]
        sys.modules.update(dict.fromkeys(hidden))  # None: an import of it fails, and it counts as not installed
        try:
            for name in (*_NETWORKS, *[TRAINER] * (TRAINER in more)):
                importlib.import_module(name)
        finally:
            for name in hidden:
                del sys.modules[name]
        for name in more:
            importlib.import_module(name)
        gc.freeze()
    finally:
        if collects:
            gc.enable()
