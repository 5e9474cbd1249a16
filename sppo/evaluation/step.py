"""A step: an iteration against the one before, by the ranker and by the second judge; and how varied its answers are.

A policy that fools its ranker goes on winning by the ranker, and loses by the judge. The comparisons with the first
model do not show when that began: the policy may still be better than the first model, and worse than the one before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppo.command.errors import SPPOError
from sppo.evaluation.health import BOUNDS, health, signs, words
from sppo.evaluation.match import Match, answers_of, judges, shown
from sppo.evaluation.matrix import interval
from sppo.method.preference import Array
from sppo.rankers import backend
from sppo.recipe import Recipe
from sppo.schema import has_answer
from sppo.store.files import changed, digest, read_json, write_json
from sppo.store.manifest import Stage, read_manifest
from sppo.store.parquet import read_rows

Answered = dict[str, list[dict[str, Any]]]  # the responses to each held-out prompt, by its id

_EVEN = 1e-6  # a preference this near to 1/2 is a tie: it is what rounding makes of one


def step_stage(by: Recipe, run_dir: Path, iteration: int) -> Stage:
    """The stage that compares iteration's answers with those of the iteration before. `by`: see report.comparing."""
    here = run_dir / f"iter{iteration}" / "eval"
    asked = {("ranker" if one is by else "judge"): backend(one).identity(one) for one in judges(by).values()}
    settings: dict[str, Any] = {"iteration": iteration, "judge": name_of_judge(by)}
    if by.ranker_temperature != 1:
        settings["ranker_temperature"] = by.ranker_temperature
    return Stage(
        "step",
        here / "step.manifest.json",
        [here / "step.json"],
        inputs={**_answers(run_dir, iteration), **asked},
        settings=settings,
        remade=True,
    )


def _answers(run_dir: Path, iteration: int) -> dict[str, str]:
    """The digests of the answers that a step compares."""
    compared = {"first": 0, "before": iteration - 1, "after": iteration}
    return {name: digest(answers_of(run_dir, i)) for name, i in compared.items()}


def read_step(run_dir: Path, iteration: int) -> dict[str, Any]:
    """iter<i>/eval/step.json; {} where it is missing, damaged, or of other answers than are there: a run makes it."""
    path = run_dir / f"iter{iteration}" / "eval" / "step.json"
    try:
        written = read_manifest(path.with_name("step.manifest.json"))
        is_changed = bool(changed(path.parent, written["outputs"]))
        is_of_others = not _answers(run_dir, iteration).items() <= written["inputs"].items()
        return {} if is_changed or is_of_others else read_json(path)
    except (SPPOError, OSError):
        return {}


def write_step(by: Recipe, run_dir: Path, iteration: int, played: dict[str, dict[int, Match]]) -> None:
    """Write iter<i>/eval/step.json. played: by who judges, then by the opponent's iteration: 0, and the one before."""
    stage = step_stage(by, run_dir, iteration)
    stage.discard()
    stage.begin()
    first, after = (_answered(answers_of(run_dir, i)) for i in (0, iteration))
    (judge,) = (name for name in played if name != "ranker")
    found = {
        "iteration": iteration,
        "before": iteration - 1,
        "judge": name_of_judge(by),
        "prompts": len(after),
        "against_before": against(played["ranker"][iteration - 1], played[judge][iteration - 1]),
        "against_first": against(played["ranker"][0], played[judge][0]),
        "answers": of_answers(after),
        "first_answers": of_answers(first),
        "rises": rises(first, after),
    }
    write_json(stage.outputs[0], found)
    stage.finish({"prompts": len(after)})


def name_of_judge(by: Recipe) -> str:
    """What the second judge is called; "" where there is none."""
    return "".join(shown(one) for one in judges(by).values() if one is not by)


def _answered(path: Path) -> Answered:
    return {row["prompt_id"]: row["responses"] for row in read_rows(path, ["prompt_id", "responses"])}


def against(ranker: Match, judge: Match) -> dict[str, Any]:
    """Win rates with 95% intervals of the same comparisons by the ranker and by the judge, and how far they agree."""
    return {"ranker": _wins(ranker), "judge": _wins(judge), "agreement": agreement(ranker, judge)}


def _wins(played: Match) -> dict[str, Any]:
    """The challenger's win rate, its interval, and of how many comparisons on how many prompts."""
    rate, low, high = interval(played.probability)
    is_answered = np.isfinite(played.probability)  # (N, n, m)
    return {
        "win_rate": round(rate, 4),
        "interval": [round(low, 4), round(high, 4)],
        "comparisons": int(is_answered.sum()),
        "prompts": int(is_answered.any((1, 2)).sum()),
    }


def agreement(ranker: Match, judge: Match) -> dict[str, float]:
    """Of the pairs of answers that both have compared, the shares on which they prefer the same answer.

    same, apart and tied add up to 1: both prefer the same answer, each another one, or at least one of the two prefers
    none. ranker_tied and judge_tied: on which each of them prefers none. A pair with a response that has no answer is
    left out: nobody was asked. All shares are 0 where no pair is left.
    """
    has_both = np.isfinite(ranker.challenger_tokens)[:, :, None] & np.isfinite(ranker.opponent_tokens)[:, None, :]
    is_known = has_both & np.isfinite(ranker.probability) & np.isfinite(judge.probability)  # (N, n, m)
    sides = [_side(each.probability[is_known]) for each in (ranker, judge)]
    pairs = max(int(is_known.sum()), 1)

    def share(where: NDArray[np.bool_]) -> float:
        return round(float(where.sum()) / pairs, 4)

    return {
        "pairs": int(is_known.sum()),
        "same": share(sides[0] * sides[1] > 0),
        "apart": share(sides[0] * sides[1] < 0),
        "tied": share(sides[0] * sides[1] == 0),
        "ranker_tied": share(sides[0] == 0),
        "judge_tied": share(sides[1] == 0),
    }


def _side(probability: Array) -> Array:
    """1 where the challenger's answer is preferred, -1 where the opponent's is, 0 for a tie."""
    return np.where(np.abs(probability - 0.5) < _EVEN, 0, np.sign(probability - 0.5))


def of_answers(answered: Answered) -> dict[str, float | None]:
    """How varied the answers are, and the shares that are empty, repeat themselves or are cut. None: not defined."""
    texts = [[r["text"] for r in responses if has_answer(r)] for responses in answered.values()]
    shares = health([r for responses in answered.values() for r in responses])
    return {
        "distinct_2": _rounded(distinct_2(itertools.chain.from_iterable(texts))),
        "overlap_2": _rounded(overlap_2(texts)),
        **{name: round(shares[name], 4) for name in BOUNDS},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def bigrams(text: str) -> list[tuple[str, str]]:
    """Each two neighbouring words of a text, in small letters."""
    return list(itertools.pairwise(words(text)))


def distinct_2(texts: Iterable[str]) -> float | None:
    """Distinct bigrams of all texts together, divided by their number (arXiv 1510.03055). None where there is none.

    It falls where a policy says the same to all prompts. It also falls where answers only get longer.
    """
    found = [pair for text in texts for pair in bigrams(text)]
    return len(set(found)) / len(found) if found else None


def overlap_2(texts: Iterable[list[str]]) -> float | None:
    """How alike the answers to one prompt are: the mean Jaccard overlap of the bigrams of two of them, 0 to 1.

    texts: those of each prompt. The mean is over all pairs of all prompts; None where no prompt has two answers. Two
    answers without bigrams overlap by 1 where they are the same, else by 0.
    """
    found = []
    for of_prompt in texts:
        for a, b in itertools.combinations(of_prompt, 2):
            one, two = set(bigrams(a)), set(bigrams(b))
            found.append(len(one & two) / len(one | two) if one or two else float(a == b))
    return sum(found) / len(found) if found else None


def rises(first: Answered, after: Answered) -> dict[str, list[float]]:
    """The 95% interval of how much the share of each sign of bad health rose against the first model's.

    By the bootstrap over prompts of matrix.interval, of each prompt's difference.
    """
    now, then = ({key: [signs(r) for r in answered[key]] for key in first} for answered in (after, first))
    found = {}
    for name in BOUNDS:
        shares = ([np.mean([of[name] for of in each]) for each in signed.values()] for signed in (now, then))
        of_now, of_then = (np.array(of, np.float64) for of in shares)  # (N,)
        _, low, high = interval((of_now - of_then)[:, None, None])
        found[name] = [round(low, 4), round(high, 4)]
    return found
