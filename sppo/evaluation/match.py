"""Match: two models' answers to the same held-out prompts, compared pair by pair, for the report and the win matrix."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from sppo.command.errors import SPPOError, UsageError
from sppo.command.progress import progress
from sppo.method.preference import Array, sigmoid
from sppo.method.winrates import over_no_answer
from sppo.models.files import public_name
from sppo.rankers import Ranker, backend, log_odds, pending_chunks
from sppo.recipe import Recipe, is_second_judge, second_judge
from sppo.schema import Message, Pair, answer_tokens, content_id, has_answer
from sppo.store.files import digest
from sppo.store.journal import Journal
from sppo.store.manifest import Stage
from sppo.store.parquet import read_rows, write_parquet

_CHUNK = 64  # prompts whose comparisons a ranker gets at once


@dataclass
class Match:
    """What a judge thinks of N prompts' answers: n responses of the challenger to each, m of the opponent.

    probability: P(challenger's response beats opponent's), (N, n, m); NaN where the judge gave no answer. Where a
    response has no answer, because its thought did not end, the judge is not asked: see winrates.over_no_answer.
    challenger_tokens, opponent_tokens: the lengths of their answers, (N, n) and (N, m); NaN where there is none.
    """

    probability: Array
    challenger_tokens: Array
    opponent_tokens: Array


class _Pairing(NamedTuple):
    """A prompt, and what both models answered to it."""

    prompt_id: str
    prompt: list[Message]
    challenger: list[dict[str, Any]]  # responses
    opponent: list[dict[str, Any]]


# settings of --ranker that hold for the second judge too: how a PairRM reads a prompt, how a server is asked
_SHARED = ("ranker_prompt", "ranker_concurrency", "ranker_timeout", "ranker_retries")


def judges(recipe: Recipe) -> dict[str, Recipe]:
    """{"ranker": recipe, <judge's name>: the same recipe with --judge as its ranker}. The name is safe in a file name.

    What else is set of the ranker (its revision, its address) is not the judge's, which has the defaults there. Raises
    UsageError for a judge of the name `ranker`, whose figures would replace the ranker's.
    """
    found = {"ranker": recipe}
    if not recipe.judge:
        return found
    judge, usual = second_judge(recipe.judge), Recipe()
    name = judge.ranker.partition(":")[2]
    if judge.backend != "function":
        model = re.sub(r"[^\w.-]+", "_", PurePath(judge.ranker).name, flags=re.ASCII)
        name = f"{judge.backend}-{model[:60]}"
    if name in found:
        raise UsageError(f"--judge {recipe.judge}: the name {name} is the ranker's; give the function another name")
    of_ranker = {field.name for field in dataclasses.fields(Recipe) if field.name.startswith(("ranker_", "judge_"))}
    own = {key: getattr(usual, key) for key in of_ranker - {*_SHARED}}
    own |= {"ranker": judge.ranker, "ranker_backend": judge.backend, "ranker_url": judge.url}
    found[name] = dataclasses.replace(recipe, **own)
    return found


def shown(judge: Recipe) -> str:
    """What a judge's recipe is called in tables and settings: backend:model, without its server's address."""
    if judge.ranker_backend == "function":
        return judge.ranker
    return f"{judge.ranker_backend}:{public_name(judge.ranker)}"


def fetch_judge(recipe: Recipe) -> None:
    """Get what the second judge needs. Raises SPPOError, which names --judge, where that cannot be had."""
    for judge in judges(recipe).values():
        if judge is not recipe:
            with naming(judge):
                backend(judge).fetch(judge)


@contextlib.contextmanager
def naming(judge: Recipe) -> Iterator[None]:
    """Put --judge before what a second judge's backend says of it. The ranker's own failures stay as they are."""
    try:
        yield
    except UsageError:  # it names the flag itself
        raise
    except SPPOError as error:
        if not is_second_judge(judge):
            raise
        raise SPPOError(f"--judge {shown(judge)}: {error}") from None


def iterations_of(run_dir: Path) -> list[int]:
    """The numbers of a run's iter<i> directories, in order. iter0, if it is there, holds the first model's answers."""
    return sorted(int(p.name[4:]) for p in run_dir.glob("iter*") if p.name[4:].isdecimal())


def iteration_models(run_dir: Path) -> dict[int, Path]:
    """The trained model of each iteration of a run that has one, in order. Raises SPPOError where none has."""
    found = {i: model for i in iterations_of(run_dir) if (model := run_dir / f"iter{i}" / "model").is_dir()}
    if not found:
        raise SPPOError(f"--run_dir {run_dir}: no iter<i>/model in it")
    return found


def answers_of(run_dir: Path, iteration: int) -> Path:
    """The held-out prompts' answers of an iteration's model; iteration 0 is the first model."""
    return run_dir / f"iter{iteration}" / "eval" / "responses.parquet"


def match_stage(judge: Recipe, judge_name: str, run_dir: Path, opponent: int, challenger: int) -> Stage:
    """The comparison of two iterations' answers by the ranker of the recipe `judge`, called `judge_name`."""
    challenging, opposing = answers_of(run_dir, challenger), answers_of(run_dir, opponent)
    here, name = challenging.parent, f"against-iter{opponent}-{_file_name(judge, judge_name)}"  # may hold dots
    with naming(judge):
        asked = backend(judge).identity(judge)
    inputs = {"first": digest(opposing), "second": digest(challenging), "ranker": asked}
    # the file holds probabilities, so that another temperature compares again
    settings = {} if judge.ranker_temperature == 1 else {"ranker_temperature": judge.ranker_temperature}
    output = here / f"{name}.parquet"
    return Stage("match", here / f"{name}.manifest.json", [output], inputs, settings, here / f"{name}.journal")


def _file_name(judge: Recipe, name: str) -> str:
    """The name of a judge's files. Two models may have one name: in two directories, or on the Hub by two owners."""
    is_plain = name == "ranker" or judge.ranker_backend == "function"
    return name if is_plain else f"{name}-{content_id([judge.ranker_backend, judge.ranker])[:8]}"


def match(
    judge: Recipe,
    judge_name: str,
    run_dir: Path,
    opponent: int,
    challenger: int,
    overwrite: bool = False,
    load: Callable[[], Ranker] | None = None,
) -> Match:
    """Compare every response of one with every response of the other, both ways round; keep it, and return it.

    load: gives the ranker, where it is loaded once for several matches.
    A journal keeps what a killed try had compared. Raises SPPOError where the two answer different prompts.
    """
    stage = match_stage(judge, judge_name, run_dir, opponent, challenger)
    pairings = _pairings(answers_of(run_dir, challenger), answers_of(run_dir, opponent))
    if stage.make_ready(overwrite):
        stage.begin()
        journal = stage.open_journal()
        label = f"{judge_name}: iteration {challenger} against {opponent}"
        ranker = load or partial(backend(judge).load, judge)
        with naming(judge):
            _compare(ranker, judge.ranker_temperature, pairings, journal, label)
        made = ({"prompt_id": each.prompt_id, **journal.read(each.prompt_id)} for each in pairings)
        stage.finish({"prompts": write_parquet(stage.outputs[0], _schema(), made)}, ranker=judge.ranker)
        journal.remove()

    table = {row["prompt_id"]: row["probability"] for row in read_rows(stage.outputs[0], ["prompt_id", "probability"])}
    probability = np.array([table[each.prompt_id] for each in pairings], dtype=np.float64)
    if not np.isfinite(probability).any():
        again = f"scripts/report.py --recipe {run_dir}/iter{challenger}/recipe.yaml --overwrite"
        with naming(judge):
            raise SPPOError(
                f"{shown(judge)} has answered for no pair of iterations {challenger} and {opponent}, so there is no "
                f"win rate; mend it, and compare again: {again}"
            )
    return Match(
        probability=probability,
        challenger_tokens=_lengths([each.challenger for each in pairings]),
        opponent_tokens=_lengths([each.opponent for each in pairings]),
    )


def _compare(
    load: Callable[[], Ranker], temperature: float, pairings: list[_Pairing], journal: Journal, label: str
) -> None:
    """Put {"probability": (n, m)} of every prompt that the journal lacks into it."""

    def is_done(pairing: _Pairing) -> bool:
        return pairing.prompt_id in journal.done

    with progress(len(pairings), label, "prompt", len(journal.done)) as bar:
        for ranker, asked in pending_chunks(pairings, is_done, _CHUNK, load):
            for pairing, block in zip(asked, _blocks(ranker, asked, temperature), strict=True):
                if not is_done(pairing):
                    journal.add(pairing.prompt_id, {"probability": block.tolist()})
                    bar.update()


def _lengths(responses: list[list[dict[str, Any]]]) -> Array:
    """Tokens of each answer, (N, n); NaN for a response without one."""
    return np.array([[answer_tokens(r) if has_answer(r) else np.nan for r in row] for row in responses], np.float64)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([("prompt_id", pa.string()), ("probability", pa.list_(pa.list_(pa.float64())))])


def _pairings(challenger: Path, opponent: Path) -> list[_Pairing]:
    """The pairing of every prompt, in the opponent's order."""
    columns = ["prompt_id", "prompt", "responses"]
    old = {row["prompt_id"]: row for row in read_rows(opponent, columns)}
    new = {row["prompt_id"]: row for row in read_rows(challenger, columns)}
    if set(old) != set(new):
        raise SPPOError(
            f"{opponent} and {challenger} answer different prompts; delete the eval directories and report again"
        )
    return [_Pairing(key, row["prompt"], new[key]["responses"], row["responses"]) for key, row in old.items()]


def _blocks(ranker: Ranker, pairings: list[_Pairing], temperature: float) -> Iterator[Array]:
    """P(challenger's i beats opponent's j), (n, m), of each prompt, from both orders of each pair of answers.

    An answer beats a response without one for certain; two without one are even.
    """
    pairs: list[Pair] = []
    for p in pairings:
        challenger, opponent = (filter(has_answer, responses) for responses in (p.challenger, p.opponent))
        pairs += [(p.prompt, a["text"], b["text"]) for a, b in itertools.product(challenger, opponent)]
    found = sigmoid(log_odds(ranker, pairs) / temperature)
    start = 0
    for pairing in pairings:
        first, second = (np.array([*map(has_answer, r)]) for r in (pairing.challenger, pairing.opponent))
        both = np.outer(first, second)  # (n, m)
        count, block = int(both.sum()), np.zeros(both.shape)
        block[both] = found[start : start + count]  # in the order of the pairs: by row
        yield over_no_answer(block[None], first[None], second[None])[0]
        start += count
