"""The user's own preference model, `--ranker module:name`: a function, or a class that may load weights.

def longer(prompt: str, first: str, second: str) -> float:   # in a module that Python can import
    return len(first) - len(second)                          # a logit: above 0 where `first` is better

class Longer:                                                # made once in each process that asks it
    def logits(self, pairs: list[Pair]) -> list[float]:      # a whole list: (messages, first, second) of each pair
        return [len(first) - len(second) for _, first, second in pairs]

What a class may have besides is in docs/rankers.md. A function with the attribute `batched = True` takes what `logits`
takes. Nothing is guessed from a name or from the number of arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from sppo.command.errors import FOREIGN, SPPOError, UsageError
from sppo.recipe import Recipe, is_second_judge
from sppo.schema import Message, Pair, prompt_text
from sppo.store.files import digest

Function = Callable[..., Any]  # the user's: what it takes and returns shows only when it is called
_NO_LIST = (type(None), bool, int, float, str, bytes, Mapping, Set)  # that would be read as logits, or not at all
_LISTS = "logits for a list of pairs; return a number for each, in their order, or yield (index, number)"


def load_function(name: str, flag: str) -> Function:
    """The function or class that `module:name` names. Raises UsageError, which says which flag gave it."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file here hides no package
    try:
        imported = importlib.import_module(module)
    except FOREIGN as error:
        said = f"{type(error).__name__}: {error}"
        raise UsageError(f"{flag} {name}: not a module:function that can be imported ({said})") from None
    found = getattr(imported, function, None)
    if found is None:  # the file may be another one of this name than the user thinks of
        file = getattr(imported, "__file__", None) or "which is built into Python"
        raise UsageError(
            f"{flag} {name}: not a module:function that can be imported: there is no {function} in {module}, {file}"
        )
    if not callable(found):
        raise UsageError(f"{flag} {name}: not a function or a class")
    return found


def load_own(name: str, flag: str) -> Function:
    """As load_function, for a ranker. Raises UsageError for what is none. A class is not made: that may take long."""
    found = load_function(name, flag)
    if isinstance(found, type) and not callable(getattr(found, "logits", None)):
        raise UsageError(f"{flag} {name}: a class that ranks has a method logits(self, pairs)")
    identity = inspect.getattr_static(found, "identity", None)
    if isinstance(found, type) and identity is not None and not isinstance(identity, (classmethod, staticmethod)):
        raise UsageError(
            f"{flag} {name}: put @classmethod above its identity(). It is asked in many processes whether the work is "
            "done, and none of them should load the ranker for that"
        )
    batched = getattr(found, "batched", False)
    if not isinstance(batched, bool):
        raise UsageError(f"{flag} {name}: its attribute batched is {batched!r}, not True or False")
    if not isinstance(found, type):
        _check_arguments(found, batched, f"{flag} {name}")
    return found


def _check_arguments(function: Function, batched: bool, which: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return
    try:
        signature.bind(*[None] * (1 if batched else 3))
    except TypeError:
        takes = "(pairs), because it says batched = True" if batched else "(prompt, first, second)"
        hint = "" if batched else "; one that takes a whole list of pairs has the attribute batched = True"
        raise UsageError(f"{which}: it takes {signature}, and is called with {takes}{hint}") from None


class FunctionRanker:
    """Asks the function once a pair, with the prompt as text."""

    batched = False

    def __init__(self, function: Function, name: str) -> None:
        self.function, self.name = function, f"the ranker's function {name}"

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, what the function returns) in the order of `pairs`."""
        for index, (prompt, first, second) in enumerate(pairs):
            try:
                said = self.function(prompt_text(prompt), first, second)
            except FOREIGN as error:
                raise _failed(self.name, error) from None
            yield index, _number(self.name, said)

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """0: the function gets all of the text."""
        return 0


class ListRanker:
    """Asks the user's `ask` about a whole list of pairs at once. `owner`: the object whose method it is, if any.

    What the owner does not say of itself is taken to be: it answers in batches, and reads all of each text.
    """

    def __init__(self, ask: Function, name: str, owner: object = None) -> None:
        self.ask, self.name, self.owner = ask, name, owner
        self.batched: bool = getattr(owner, "batched", True)
        self._count = getattr(owner, "count_cut", None)

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index, logit) of every pair. Raises SPPOError where a pair has no logit, or more than one.

        Plain numbers are counted before the first of them is used: with one left out, all behind it are another pair's.
        """
        total, numbers, left = len(pairs), list[float](), set(range(len(pairs)))
        for said in self._answers(list(pairs)) if pairs else ():
            if isinstance(said, tuple):
                index, logit = self._indexed(said)
                if index not in left:
                    raise SPPOError(f"{self.name} gave {_short(said)} twice, or of no pair: they are 0 to {total - 1}")
                left.remove(index)
                yield index, logit
            else:
                numbers.append(_number(self.name, said))
            if len(numbers) > total:
                break

        indexed = total - len(left)
        if indexed and numbers:
            raise SPPOError(f"{self.name} gave {indexed} (index, number) and a number too; give only one of the two")
        if indexed + len(numbers) != total:
            count = f"more than {total}" if len(numbers) > total else str(indexed + len(numbers))
            raise SPPOError(f"{self.name} gave {count} {_LISTS}; the list had {total} pairs")
        yield from enumerate(numbers)

    def _answers(self, pairs: list[Pair]) -> Iterator[Any]:
        try:
            given = self.ask([(_copied(messages), *texts) for messages, *texts in pairs])
            if isinstance(given, _NO_LIST):
                raise SPPOError(f"{self.name} gave {_short(given)}, not {_LISTS}")
            yield from given
        except FOREIGN as error:
            raise _failed(self.name, error) from None

    def _indexed(self, said: tuple[Any, ...]) -> tuple[int, float]:
        try:
            index, logit = said
            return operator.index(index), _number(self.name, logit)
        except (TypeError, ValueError):
            raise SPPOError(f"{self.name} gave {_short(said)}, not a logit or (index, logit)") from None

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """What the owner says of it; 0 where it does not say."""
        if self._count is None:
            return 0
        try:
            return operator.index(self._count(_copied(prompt), list(responses)))
        except FOREIGN as error:
            raise _failed(f"{self.name}: count_cut", error) from None


def _copied(messages: list[Message]) -> list[Message]:
    """Messages for one call of the user's code: an answer that it appends to them must not reach the next pair."""
    return [{**message} for message in messages]


def _number(name: str, said: Any) -> float:
    """A logit. NaN and infinity are numbers here: they are no answer, and are counted as such."""
    try:
        if isinstance(said, (str, bytes)):
            raise TypeError
        return float(said)
    except FOREIGN:
        raise SPPOError(f"{name} gave {_short(said)}, not a number; it should return a logit") from None


def _short(value: object) -> str:
    """A value in a line."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) < 100 else f"{shown[:100]}..."


def _failed(name: str, error: BaseException) -> SPPOError:
    """What a failure in the user's code means. An SPPOError is ours, and says that itself."""
    if isinstance(error, SPPOError):
        return error
    places = traceback.extract_tb(error.__traceback__)
    theirs = [place for place in places if place.filename != __file__ and "site-packages" not in place.filename]
    place = (theirs or places)[-1]
    return SPPOError(
        f"{name} failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); "
        "mend it and run the same command again"
    )


def source_file(name: str, flag: str) -> Path:
    """The file that the function or class `module:name` stands in; for a callable object, the file of `module`."""
    function = load_function(name, flag)
    try:
        return Path(inspect.getfile(inspect.unwrap(function)))
    except TypeError:  # an object that can be called, a functools.partial, a function written in C
        module = sys.modules[name.partition(":")[0]]
    file = getattr(module, "__file__", None)
    if not file:
        raise UsageError(f"{flag} {name}: it is built into Python; name a function in a file of your own")
    return Path(file)


@functools.cache
def _made(kind: type, name: str) -> Any:
    """The one object of the class in this process."""
    try:
        return kind()
    except FOREIGN as error:
        raise _failed(f"the ranker's class {name}, which is made without arguments,", error) from None


def _said_identity(found: Function, name: str) -> dict[str, Any]:
    """What identity() of the user's class or object says of its weights, through JSON; nothing where it has none."""
    identity, which = getattr(found, "identity", None), f"the ranker's {name}: identity()"
    if identity is None:
        return {}
    try:
        said = identity()
    except FOREIGN as error:
        raise _failed(which, error) from None
    try:
        told = json.loads(json.dumps(said, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        told = None
    if not told:
        raise SPPOError(f"{which} gave {_short(said)}; return a text, or what else JSON can hold, about its weights")
    return {"identity": told}


def _flag(recipe: Recipe) -> str:
    """The flag that named what is the ranker of this recipe."""
    return "--judge" if is_second_judge(recipe) else "--ranker"


def fetch(recipe: Recipe) -> Path:
    """The file that the function or class stands in. Raises SPPOError where it cannot be a ranker."""
    _said_identity(load_own(recipe.ranker, _flag(recipe)), recipe.ranker)  # which may fetch its weights
    return source_file(recipe.ranker, _flag(recipe))


def identity(recipe: Recipe) -> dict[str, Any]:
    """The name, the text of the module, and what identity() says where there is one. A class is not made for it."""
    found = load_own(recipe.ranker, _flag(recipe))
    source = digest(source_file(recipe.ranker, _flag(recipe)))
    return {"backend": "function", "ranker": recipe.ranker, "source": source, **_said_identity(found, recipe.ranker)}


def load(recipe: Recipe) -> FunctionRanker | ListRanker:
    """The function or the class, ready to be asked. A class is made once a process."""
    name = recipe.ranker
    found = load_own(name, _flag(recipe))
    if isinstance(found, type):
        made = _made(found, name)
        return ListRanker(made.logits, f"the ranker's class {name}", made)
    if getattr(found, "batched", False):
        return ListRanker(found, f"the ranker's function {name}")
    return FunctionRanker(found, name)
