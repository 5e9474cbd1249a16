"""Imports of torch and transformers in about half of their usual time.

It saves 2 s of computing in each process that loads a model or a tokenizer, and an iteration starts several of them:
2.2 s in place of 4.4 s, and 2.3 s in place of 5.1 s where the trainer is imported too.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from typing import Any

# transformers imports them where they are installed: for assisted decoding, and for the losses of object detection
_UNUSED = ("sklearn", "scipy")
_NETWORKS = ("torch", "transformers.modeling_utils", "transformers.generation.utils")
TRAINER = "transformers.trainer"  # it imports datasets only to know one when it sees one; ours is none


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A mere directory of that name on the search path does not count, although Python could import it: wandb, for one,
    makes such a directory for its logs.
    """
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def import_networks(*more: str) -> None:
    """Import torch, the parts of transformers that every network needs, and the modules `more`.

    Two things save the time. transformers does not see the packages that nothing here uses through it. And the garbage
    collector is off: it would look through all modules again and again. Later it leaves these modules out too.
    """
    if all(name in sys.modules for name in (*_NETWORKS, *more)):
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        hidden: list[str] = []
        if "transformers" not in sys.modules:  # else it knows already that they are installed
            unused = (*_UNUSED, "datasets") if TRAINER in more else _UNUSED
            hidden = [name for name in unused if name not in sys.modules]
        absent: dict[str, Any] = dict.fromkeys(hidden)  # None: an import of it fails, and it counts as not installed
        sys.modules.update(absent)
        try:
            for name in (*_NETWORKS, TRAINER) if TRAINER in more else _NETWORKS:
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
