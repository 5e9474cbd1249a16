"""The win matrix: the first model and every iteration's against each other, on the answers to the held-out prompts.

P(row beats column) is the mean over prompts and over pairs of responses. The judge sees each pair in both orders, and P
is the sigmoid of half the difference of the two logits, so the matrix and its transpose add up to 1.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sppo.command.errors import SPPOError
from sppo.command.progress import columns
from sppo.evaluation.match import (
    Match,
    answers_of,
    fetch_judge,
    iterations_of,
    judges,
    match,
    match_stage,
    shown,
)
from sppo.method.preference import Array, sigmoid
from sppo.rankers import backend
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import Stage

DRAWS = 2000  # of the bootstrap
_SEED = 0

Matches = dict[tuple[int, int], Match]  # by (a, b), places in the matrix: a is the opponent, and b > a the challenger


class WinRate(NamedTuple):
    """A win rate and the ends of its 95% interval, all from 0 to 1."""

    rate: float
    low: float
    high: float


def models_of(run_dir: Path) -> list[int]:
    """The iterations whose answers to the held-out prompts are there.

    Raises SPPOError where fewer than two are, or where answers that a manifest tells of are gone.
    """
    found = [i for i in iterations_of(run_dir) if (answers_of(run_dir, i).parent / "responses.manifest.json").exists()]
    if lost := [str(answers_of(run_dir, i)) for i in found if not answers_of(run_dir, i).exists()]:
        raise SPPOError(f"{', '.join(lost)}: gone, though made; run the driver's command again, which draws them again")
    if len(found) < 2:
        raise SPPOError(
            f"{run_dir} holds held-out answers of {len(found)} models, and two can be compared; a run with "
            "--eval_prompts draws them, or scripts/report.py"
        )
    return found


def match_stages(recipe: Recipe, run_dir: Path) -> dict[str, Stage]:
    """The stages that compare each two models, by the ranker and by the second judge, by what they compare."""
    recipe = pinned(recipe, run_dir / "iter1" / "data")
    return {
        f"{name}: {second} against {first}": match_stage(by, name, run_dir, first, second)
        for name, by in judges(recipe).items()
        for first, second in itertools.combinations(models_of(run_dir), 2)
    }


def _is_compared(recipe: Recipe, run_dir: Path) -> bool:
    """Whether nothing is left to compare, so that nobody has to be there to ask."""
    try:
        return all(stage.is_current() for stage in match_stages(recipe, run_dir).values())
    except SPPOError:  # a ranker or judge that cannot be had
        return False


def matrix_stage(recipe: Recipe, run_dir: Path) -> Stage:
    """The stage that puts the matches together. Raises SPPOError where one is not there."""
    matches = {label: stage.outputs[0] for label, stage in match_stages(recipe, run_dir).items()}
    if lost := [str(path) for path in matches.values() if not path.exists()]:
        raise SPPOError(f"not yet compared: {', '.join(lost)}; run scripts/win_matrix.py")
    inputs = {label: digest(path) for label, path in matches.items()}
    settings = {"draws": DRAWS, "seed": _SEED}
    manifest, outputs = run_dir / "matrix.manifest.json", [run_dir / "matrix.json"]
    return Stage("matrix", manifest, outputs, inputs, settings, remade=True)


def win_matrix(recipe: Recipe, run_dir: Path, overwrite: bool = False) -> dict[str, Any]:
    """Compare what is not yet compared, write <run_dir>/matrix.json, and return what is in it."""
    recipe = pinned(recipe, run_dir / "iter1" / "data")
    models, by_name = models_of(run_dir), judges(recipe)
    if overwrite or not _is_compared(recipe, run_dir):
        fetch_judge(recipe)  # so that a wrong one is an error now, and not after the ranker's work
    played: dict[str, Matches] = {}
    for name, judge in by_name.items():
        load = functools.cache(functools.partial(backend(judge).load, judge))
        played[name] = {
            (a, b): match(judge, name, run_dir, models[a], models[b], overwrite, load)
            for a, b in itertools.combinations(range(len(models)), 2)
        }
    stage = matrix_stage(recipe, run_dir)
    if not stage.is_current():  # made of the matches in a moment, so one that differs is made again
        stage.discard()
        stage.begin()
        write_json(stage.outputs[0], _tables(models, by_name, played))
        stage.finish({"prompts": len(played["ranker"][0, 1].probability)})
    return read_json(stage.outputs[0])


def _tables(models: list[int], by_name: dict[str, Recipe], played: dict[str, Matches]) -> dict[str, Any]:
    """What matrix.json holds: the ranker's tables, the second judge's, mean lengths and the von Neumann winner."""
    made = {
        name: {**compare(len(models), matches), "uniform": uniform(len(models), matches)}
        for name, matches in played.items()
    }
    against_first = [played["ranker"][0, b] for b in range(1, len(models))]
    lengths = [against_first[0].opponent_tokens, *(each.challenger_tokens for each in against_first)]
    mixture, value = von_neumann_winner(np.array(made["ranker"]["win_rates"]))
    second = [name for name in by_name if name != "ranker"]
    return {
        "models": [f"iter{i}" for i in models],
        "ranker": by_name["ranker"].ranker,
        "prompts": len(against_first[0].probability),
        **made["ranker"],
        "mean_tokens": [mean_length(x) for x in lengths],
        "judge": {"name": shown(by_name[second[0]]), **made[second[0]]} if second else None,
        "von_neumann": {"mixture": np.maximum(mixture, 0).round(4).tolist(), "value": round(value, 4)},
    }


def compare(count: int, matches: Matches) -> dict[str, list[list[float]]]:
    """win_rates, low, high, length_controlled, each (count, count), from matches[a, b] of all a < b."""
    tables = {name: np.full((count, count), 0.5) for name in ("win_rates", "low", "high", "length_controlled")}
    for (a, b), played in matches.items():
        rate, low, high = interval(played.probability)
        controlled = length_controlled(played)
        for name, value in zip(tables, (rate, low, high, controlled), strict=True):
            tables[name][b, a] = value
        for name, value in zip(tables, (rate, high, low, controlled), strict=True):
            tables[name][a, b] = 1 - value
    return {name: [[round(float(x), 4) for x in row] for row in table] for name, table in tables.items()}


def uniform(count: int, matches: Matches) -> list[list[float]]:
    """[win rate, low, high] of the uniform mixture of all models against each of them.

    The mixture answers each prompt with a model that is drawn at random, each as likely: the average policy, which
    SPPO's theory is about. Its P is the mean of its models' P, so nothing is drawn here. A model against itself is 1/2.
    """
    by_prompt = {}  # P(b beats a), (N,); NaN where the judge gave no answer
    for (a, b), played in matches.items():
        with np.errstate(invalid="ignore"):
            by_prompt[a, b] = np.nansum(played.probability, (1, 2)) / np.isfinite(played.probability).sum((1, 2))

    rates = []
    for j in range(count):
        others = [by_prompt[j, i] if i > j else 1 - by_prompt[i, j] for i in range(count) if i != j]
        mixed = (np.sum(others, axis=0) + 0.5) / count
        rates.append([round(x, 4) for x in interval(mixed[:, None, None])])
    return rates


def interval(probability: Array) -> WinRate:
    """Mean of P, (N, n, m), and its 95% interval: percentiles of a bootstrap that draws whole prompts.

    Answers to one prompt are alike, so they are drawn together; resampling single pairs would make it too narrow.
    A prompt without any answer of the judge tells nothing, so it is not drawn. Raises SPPOError where all of P is NaN.
    """
    sums, counts = np.nansum(probability, (1, 2)), np.isfinite(probability).sum((1, 2))  # (N,)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not counts.size:
        raise SPPOError("no pair has been answered, so there is no win rate")
    n = len(sums)
    drawn = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), DRAWS)  # (draws, N)
    rates = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(rates, (0.025, 0.975))
    return WinRate(float(sums.sum() / counts.sum()), float(low), float(high))


def length_controlled(played: Match) -> float:
    """The win rate at equal length: sigmoid(theta) of the fit P = sigmoid(theta + phi * tanh(d / std(d))).

    d is the difference of the two answers' lengths in tokens; a pair with a response without an answer has none, and is
    left out. This is AlpacaEval 2's model (arXiv 2404.04475,
    equation 2) without its term for the instruction's difficulty, which takes many models to estimate. Fitted by
    cross-entropy.
    """
    from scipy.optimize import minimize

    apart = played.challenger_tokens[:, :, None] - played.opponent_tokens[:, None, :]  # (N, n, m)
    answered = np.isfinite(played.probability) & np.isfinite(apart)
    p, d = played.probability[answered], apart[answered]
    if not d.size:  # every pair has a response without an answer
        return interval(played.probability).rate
    spread = d.std()
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = weights[0] + weights[1] * x
        error = sigmoid(z) - p
        # 1e-4: where every pair is won, the fit would run to infinity
        value = (np.logaddexp(0, z) - p * z).mean() + 1e-4 * (weights**2).sum() / 2
        return value, np.array([error.mean(), (error * x).mean()]) + 1e-4 * weights

    return float(sigmoid(minimize(loss, np.zeros(2), jac=True).x[0]))


def mean_length(lengths: Array) -> float:
    """The mean tokens of the answers, (N, n) with NaN where a response has none; 0 where none has."""
    known = lengths[np.isfinite(lengths)]
    return round(float(known.mean()), 2) if known.size else 0.0


def von_neumann_winner(win_rates: Array) -> tuple[Array, float]:
    """The mixture of models q that no mixture beats, max over q of min over j of sum_i q_i M_ij, and that value.

    By linear programming. With M + M^T = 1 the value is 1/2; where several mixtures reach it, this is one of them.
    """
    from scipy.optimize import linprog

    k = len(win_rates)
    cost = np.append(np.zeros(k), -1.0)  # of (q, v): maximise v
    at_least = np.hstack([-win_rates.T, np.ones((k, 1))])  # v - sum_i q_i M_ij <= 0 for every j
    shares, bounds = np.append(np.ones(k), 0.0)[None], [(0, 1)] * k + [(None, None)]
    solved = linprog(cost, at_least, np.zeros(k), shares, [1.0], bounds)
    if solved.status:
        raise SPPOError(f"no mixture was found for {win_rates.tolist()}: {solved.message}")
    return solved.x[:k], float(solved.x[k])


def print_matrix(found: dict[str, Any]) -> None:
    """matrix.json, for a person."""
    models = found["models"]
    print(f"\nWin rates in %, row against column, with 95% intervals, on {found['prompts']} held-out prompts:")
    _print_judge("ranker", found, models, found["mean_tokens"])
    if found["judge"]:
        _print_judge(found["judge"]["name"], found["judge"], models, found["mean_tokens"])

    shares = [f"{m} {_percent(q)}%" for m, q in zip(models, found["von_neumann"]["mixture"], strict=True) if q > 0]
    print(
        f"No model, and no mixture of models, wins more than half against this mixture (ranker): {', '.join(shares)}."
    )


def _print_judge(name: str, of: dict[str, Any], models: list[str], mean_tokens: list[float]) -> None:
    """One judge's matrix, and what it says of the uniform mixture and of the last model at equal length."""
    lines = [[name, *models, "mean_tokens"]]
    for i, model in enumerate(models):
        rates = [_win_rate(of["win_rates"][i][j], of["low"][i][j], of["high"][i][j]) for j in range(len(models))]
        rates[i] = ""
        lines.append([model, *rates, f"{mean_tokens[i]:g}"])
    print("\n".join(columns(lines)))

    if "uniform" in of:
        wins = ", ".join(f"{model} {_win_rate(*rate)}" for model, rate in zip(models, of["uniform"], strict=True))
        print(f"Win rates in % of a mixture, one of these models at random for each prompt ({name}): against {wins}.")
    last = _percent(of["length_controlled"][-1][0])
    print(f"Win rate of {models[-1]} against {models[0]} at equal length ({name}): {last}%.")


def _win_rate(rate: float, low: float, high: float) -> str:
    return f"{_percent(rate)} ({_percent(low)} to {_percent(high)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
