"""Preference models behind one small interface: a logit for each (prompt, a, b). One module each.

`--ranker_backend reward-model` is the module reward_model.py in here, so a further backend is one further file. It has

    fetch(recipe) -> str        gets what it needs (weights into the cache, a server's word) and says where that is
    identity(recipe) -> dict    what decides its logits; a ranking made under another identity is not kept
    load(recipe) -> Ranker      ready to answer
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from sppo.command.errors import OtherWorkError, SPPOError
from sppo.command.stopping import end_if_asked, heard
from sppo.method.preference import Array
from sppo.models import chat
from sppo.models.files import commit_of
from sppo.models.policy import policy_of
from sppo.recipe import Recipe
from sppo.schema import Message, Pair, content_id, prompt_text
from sppo.store.files import read_json, write_json
from sppo.store.journal import differences
from sppo.store.manifest import read_manifest
from sppo.store.shards import begun_shards, shard_paths

if TYPE_CHECKING:
    import torch

Row = TypeVar("Row")

# what a ranker is asked to see whether it answers
TRIAL: Pair = ([{"role": "user", "content": "What is two plus two?"}], "Four.", "I do not like questions.")


class Ranker(Protocol):
    """A preference model that is ready to answer.

    `batched`: it answers pairs in batches, so that a logit's last bits depend on the pairs beside it.
    """

    batched: bool

    def logits(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, float]]:
        """(index in `pairs`, logit) of every pair, in the order in which the answers come.

        The logit is above 0 where the response shown first is better; it is not finite where there is no answer.
        """
        ...

    def count_cut(self, prompt: list[Message], responses: Sequence[str]) -> int:
        """How many texts, of the prompt and its responses, the ranker reads only in part."""
        ...


def backend(recipe: Recipe) -> ModuleType:
    """The module that the recipe's ranker_backend names; `auto` is a function for module:function, else PairRM."""
    name = recipe.ranker_backend
    if name == "auto":
        name = "function" if re.fullmatch(r"[\w.]+:\w+", recipe.ranker) else "pairrm"
    return importlib.import_module(f"sppo.rankers.{name.replace('-', '_')}")


def pinned(recipe: Recipe, data_dir: Path) -> Recipe:
    """The recipe with the ranker's revision that preload.py wrote into $DATA/ranker.json, if it did.

    A branch may move while shards, or iterations, are made; a commit does not.
    """
    path = data_dir / "ranker.json"
    if not path.exists() and recipe.run_dir:  # one ranker for all iterations of a run
        path = Path(recipe.run_dir) / "iter1" / "data" / "ranker.json"
    if not path.exists():
        return recipe
    pin = read_json(path)
    told = {key: pin.get(key) for key in ("ranker", "asked", "revision")} if isinstance(pin, dict) else {}
    if not told or None in told.values() or pin.get("check", content_id(told)) != content_id(told):  # older: no check
        raise SPPOError(f"{path} is damaged; delete it and run preload.py again")
    if pin["ranker"] != recipe.ranker or recipe.ranker_revision not in (pin["asked"], pin["revision"]):
        return recipe
    return dataclasses.replace(recipe, ranker_revision=pin["revision"])


def preload(recipe: Recipe, data_dir: Path | None, overwrite: bool = False) -> None:
    """Fetch the ranker, and keep the commit that the Hub gave in $DATA/ranker.json (see pinned).

    Raises OtherWorkError where another ranker, or another commit of it, has begun the ranking in $DATA.
    """
    wanted = pinned(recipe, data_dir) if data_dir else recipe
    where = backend(wanted).fetch(wanted)
    commit = commit_of(Path(where))
    if data_dir and commit and wanted.ranker_revision != commit:
        pin = {"ranker": recipe.ranker, "asked": recipe.ranker_revision, "revision": commit}
        if not overwrite:
            _refuse_another(pin, data_dir)
        write_json(data_dir / "ranker.json", {**pin, "check": content_id(pin)})
    print(f"preload: {recipe.ranker} is at {where}" + (f"; pinned to --ranker_revision {commit}" if commit else ""))


def _refuse_another(pin: dict[str, str], data_dir: Path) -> None:
    begun, path = set(begun_shards(data_dir / "ranking")), data_dir / "ranker.json"
    manifests = [shard_paths(data_dir / "ranking", number)[1] for number in begun]
    made = {read_manifest(manifest)["ranker"] for manifest in manifests if manifest.exists()}
    kept = {key: value for key, value in read_json(path).items() if key in pin} if path.exists() else {}
    there = kept if begun and kept else {"ranker": min(made, default=pin["ranker"])}
    if changed := differences(there, {key: pin[key] for key in there}):
        said = "\n  ".join([f"{data_dir / 'ranking'} is the work of another ranker:", *changed])
        raise OtherWorkError(said)


def ask_trial(ranker: Ranker, pairs: list[Pair], which: str) -> list[float]:
    """The ranker's logits of trial pairs. Raises SPPOError, which names `which`, where one is not a finite number."""
    try:
        answers = dict(ranker.logits(pairs))
    except SPPOError as error:
        raise SPPOError(f"{which} fails on a trial pair: {error}") from None
    if not all(map(math.isfinite, answers.values())):
        raise SPPOError(f"{which} gives {list(answers.values())} for a trial pair, not finite numbers")
    return [answers[i] for i in range(len(pairs))]


def unfinished(
    rows: Iterable[Row], is_done: Callable[[Row], bool], size: int, load: Callable[[], Ranker]
) -> Iterator[tuple[Ranker, list[Row]]]:
    """(the ranker, rows to ask it about), chunk by chunk of `size` rows; it is loaded when the first is needed.

    Only what is not done is asked. But where the ranker answers in batches, the other pairs of a batch decide a
    logit's last bits: then a chunk that was cut short comes as a whole, so that the end is the same as without a kill.
    Raises KeyboardInterrupt between two chunks where the run is asked to stop.
    """
    ranker, left = None, iter(rows)
    while chunk := list(itertools.islice(left, size)):
        end_if_asked()
        missing = [row for row in chunk if not is_done(row)]
        if missing:
            if ranker is None:
                with heard():
                    ranker = load()
            yield ranker, chunk if ranker.batched else missing


def log_odds(ranker: Ranker, pairs: Sequence[Pair]) -> Array:
    """Log-odds that the first of each pair beats the second, (n,): half the difference of the logits of both orders.

    0 without asking where the two are the same text, NaN where an answer is not finite.
    """
    asked = [i for i, (_, a, b) in enumerate(pairs) if a != b]
    both = [side for i in asked for side in (pairs[i], (pairs[i][0], pairs[i][2], pairs[i][1]))]
    logits = np.full(len(both), np.nan)
    for index, logit in ranker.logits(both):
        logits[index] = logit if math.isfinite(logit) else math.nan
    found = np.zeros(len(pairs))
    found[asked] = (logits[0::2] - logits[1::2]) / 2
    return found


def batches(lengths: Sequence[int], batch_tokens: int, batch_scores: int = 1 << 62) -> Iterator[list[int]]:
    """Indices of texts, longest first, in batches of neighbours in length, so that little is padding.

    A batch has batch_tokens tokens and batch_scores (T, T) scores at most, padding included, or one text.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        stop = start + max(1, min(batch_tokens // longest, batch_scores // longest**2))
        yield order[start:stop]
        start = stop


def device_and_dtype() -> tuple[str, torch.dtype]:
    """The GPU if there is one, in bfloat16 (float16 where the GPU has none), else the CPU in float32."""
    import torch  # here: a function or a judge needs none

    if not torch.cuda.is_available():
        return "cpu", torch.float32
    return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def prompt_renderer(recipe: Recipe, tokenizer: Any = None) -> Callable[[list[Message]], str]:
    """messages -> what a PairRM reads as the prompt: its text, or the policy's chat template around it.

    tokenizer: the policy's, where it is open already.
    """
    if recipe.ranker_prompt == "text":
        return prompt_text
    tokenizer = tokenizer or policy_of(recipe).tokenizer()
    return lambda messages: chat.render(tokenizer, messages, True, recipe.chat_template_kwargs)


def prompt_identity(recipe: Recipe) -> dict[str, Any]:
    """The part of a ranker's identity that decides what prompt_renderer gives."""
    if recipe.ranker_prompt == "text":
        return {"ranker_prompt": "text"}
    model = {"model": policy_of(recipe).identity(), "chat_template_kwargs": recipe.chat_template_kwargs}
    return {"ranker_prompt": "templated", **model}
