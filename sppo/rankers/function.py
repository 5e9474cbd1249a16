"""A Python function of the user's as the preference model: `--ranker module:function`.

def longer(prompt: str, first: str, second: str) -> float:   # in a module that Python can import
    return len(first) - len(second)                          # a logit: above 0 where `first` is better
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sppo.command.errors import FOREIGN, SPPOError, UsageError
from sppo.recipe import Recipe
from sppo.schema import Message, Pair, prompt_text
from sppo.store.files import digest

Function = Callable[..., Any]  # the user's: what it takes and returns shows only when it is called


def load_function(name: str, flag: str) -> Function:
    """The function that `module:function` names. Raises UsageError, which says which flag gave it."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file here hides no package
    try:
        found = getattr(importlib.import_module(module), function)
    except FOREIGN as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{flag} {name}: not a module:function that can be imported ({said})") from None
    if not callable(found):
        raise UsageError(f"{flag} {name}: not a function")
    return found


class FunctionRanker:
    """Asks the function once a pair, with the prompt as text."""

    batched = False

    def __init__(self, function: Function, name: str) -> None:
        self.function, self.name = function, name

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, what the function returns) in the order of `pairs`."""
        for index, (prompt, first, second) in enumerate(pairs):
            yield index, self._ask(prompt_text(prompt), first, second)

    def _ask(self, *texts: str) -> float:
        name = f"the ranker's function {self.name}"
        try:
            said = self.function(*texts)
        except FOREIGN as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise SPPOError(
                f"{name} failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); "
                "mend it and run the same command again"
            ) from None
        try:
            return float(said)
        except (TypeError, ValueError, SystemExit):
            raise SPPOError(f"{name} gave {said!r}, not a number; it should return a logit") from None

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """0: the function gets all of the text."""
        return 0


def source_file(name: str, flag: str) -> Path:
    """The file that the function `module:function` stands in; for a callable object, the file of `module`."""
    function = load_function(name, flag)
    try:
        return Path(inspect.getfile(inspect.unwrap(function)))
    except TypeError:  # an object that can be called, a functools.partial, a function written in C
        module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"{flag} {name}: it is built into Python; name a function in a file of your own")
    return Path(file)


def fetch(recipe: Recipe) -> Path:
    """The file that the function stands in."""
    return source_file(recipe.ranker, "--ranker")


def identity(recipe: Recipe) -> dict[str, Any]:
    """The function's name and the text of its module."""
    return {"backend": "function", "ranker": recipe.ranker, "source": digest(fetch(recipe))}


def load(recipe: Recipe) -> FunctionRanker:
    """The function, ready to be asked."""
    return FunctionRanker(load_function(recipe.ranker, "--ranker"), recipe.ranker)
