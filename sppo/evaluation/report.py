"""The report after an iteration: the base model and the new one answer held-out prompts, and the ranker compares them.

A win rate is the mean of P(new > base) over all pairs of a prompt's responses. A ranker can be fooled, by length for
example. So a second judge can compare the same answers, and mean lengths and measures.py's figures stand beside.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from sppo.command.progress import columns
from sppo.evaluation.answers import draw
from sppo.evaluation.match import Match, answers_of, fetch_judge, iterations_of, judges, match, shown
from sppo.evaluation.matrix import interval, mean_length
from sppo.evaluation.measures import measure
from sppo.evaluation.step import step_stage, write_step
from sppo.rankers import backend
from sppo.rankers.function import load_function
from sppo.rankers.pinning import pinned
from sppo.recipe import Recipe
from sppo.store.files import digest, read_json, write_json
from sppo.store.manifest import Stage

_NO_SHARES = ("mean_tokens", "mean_thought_tokens", "base_perplexity", "kl")  # measures that are never shown in %


def comparing(recipe: Recipe, run_dir: Path, iteration: int, base: str) -> Recipe:
    """The recipe for the comparison. Its model is the base, so the ranker reads all prompts in the base's template."""
    return dataclasses.replace(pinned(recipe, run_dir / f"iter{iteration}" / "data"), model=base)


def report_stage(by: Recipe, run_dir: Path, iteration: int) -> Stage:
    """The stage that compares the answers of iteration's model with the base's; both exist. `by`: see comparing."""
    here = run_dir / f"iter{iteration}"
    answers = {"before": run_dir / "iter0/eval/responses.parquet", "after": here / "eval/responses.parquet"}
    judging = judges(by).values()
    asked = {("ranker" if one is by else "judge"): backend(one).identity(one) for one in judging}
    judge = "".join(shown(one) for one in judging if one is not by)
    settings: dict[str, Any] = {"iteration": iteration, "judge": judge}
    if by.ranker_temperature != 1:  # manifests from before there was one do not name it
        settings["ranker_temperature"] = by.ranker_temperature
    return Stage(
        "report",
        here / "eval" / "report.manifest.json",
        [here / "eval" / "report.json"],
        inputs={**{k: digest(p) for k, p in answers.items()}, **asked},
        settings=settings,
        remade=True,
    )


def report(recipe: Recipe, run_dir: Path, iteration: int, base: str, overwrite: bool = False) -> None:
    """Answer recipe.eval_prompts with the base and with iteration's model, compare, and write summary.json.

    Raises SPPOError where another ranker or judge has compared these answers; `overwrite`: they are compared again.
    """
    here = run_dir / f"iter{iteration}"
    made = ["report", "step"] if recipe.judge else ["report"]
    if overwrite or not all((here / "eval" / f"{name}.manifest.json").exists() for name in made):
        fetch_judge(recipe)  # so that a wrong one is an error now, and not after the work
    if recipe.measure:
        load_function(recipe.measure, "--measure")
    before = _answers(drawing(recipe, base, recipe.model_revision), run_dir / "iter0")
    after = _answers(drawing(recipe, str(here / "model")), here)
    by = comparing(recipe, run_dir, iteration, base)
    stage = report_stage(by, run_dir, iteration)
    has_step = bool(recipe.judge) and answers_of(run_dir, iteration - 1).exists()  # by hand it may not be there
    is_stepped = not has_step or step_stage(by, run_dir, iteration).is_current()
    if overwrite or not is_stepped or not stage.is_current():
        opponents = {0, iteration - 1} if has_step else {0}
        played = _played(by, run_dir, iteration, sorted(opponents), overwrite)

        # made of the matches, which refuse another ranker or judge, in a moment
        row = {"iteration": iteration, **_compared({name: of[0] for name, of in played.items()})}
        stage.discard()
        stage.begin()
        trained = read_json(here / "model" / "sppo_manifest.json")
        row.update(loss=trained["loss"], beta2_loss=trained["beta2_loss"])
        write_json(stage.outputs[0], row)
        stage.finish({"prompts": row["prompts"]})
        if has_step:
            write_step(by, run_dir, iteration, played)
    measure(recipe, before.parent, base)
    measure(recipe, after.parent, base, str(here / "model"))
    print_table(update_summary(run_dir))


def update_summary(run_dir: Path) -> list[dict[str, Any]]:
    """Write summary.json from what reports, measures and benchmark suites left in the run's directory."""
    rows = summary_rows(run_dir)
    write_json(run_dir / "summary.json", rows)
    return rows


def summary_rows(run_dir: Path) -> list[dict[str, Any]]:
    """A row for each iteration that has a report; its `base` holds the measures of the first model's answers.

    All iterations, also later ones: making a report again must not remove their rows from summary.json.
    """
    rows, measures = [], run_dir / "iter0/eval/measures.json"
    base = read_json(measures) if measures.exists() else {}
    for number in iterations_of(run_dir):
        here = run_dir / f"iter{number}"
        found = [here / "eval/report.json", here / "eval/measures.json"]
        report_, measured = ({**read_json(p)} if p.exists() else {} for p in found)
        suites = {p.parent.name: read_json(p)["figures"] for p in sorted(here.glob("suites/*/figures.json"))}
        if report_ or (suites and number):
            of_suites = {"suites": suites} if suites else {}
            rows.append({"iteration": number, **report_, **measured, "base": base, **of_suites})
    return rows


def drawing(recipe: Recipe, model: str, revision: str = "") -> Recipe:
    """The recipe that draws eval_pairs responses of a model to each held-out prompt."""
    held_out = {"prompts": recipe.eval_prompts, "prompts_revision": "", "prompts_part": "0/1"}
    return dataclasses.replace(recipe, model=model, model_revision=revision, pairs=recipe.eval_pairs, **held_out)


def _answers(recipe: Recipe, directory: Path) -> Path:
    return draw(recipe, directory / "eval", directory / "logs", "eval")


def _played(
    by: Recipe, run_dir: Path, iteration: int, opponents: list[int], overwrite: bool
) -> dict[str, dict[int, Match]]:
    """iteration's answers against each opponent's, by the ranker and by the second judge: by name, then by opponent.

    Each of the two is loaded once, and the first one is gone before the second one is loaded.
    """
    found: dict[str, dict[int, Match]] = {}
    for name, judge in judges(by).items():
        load = functools.cache(functools.partial(backend(judge).load, judge))
        found[name] = {i: match(judge, name, run_dir, i, iteration, overwrite, load) for i in opponents}
    return found


def _compared(played: dict[str, Match]) -> dict[str, Any]:
    """Win rates of iteration's answers over the first model's, with 95% intervals, and the mean lengths of both."""
    result: dict[str, Any] = {}
    for name, of in played.items():
        rate, low, high = interval(of.probability)
        result[f"{name}_win_rate"] = round(rate, 4)
        result[f"{name}_interval"] = [round(low, 4), round(high, 4)]
        if unanswered := int(np.isnan(of.probability).sum()):
            result[f"{name}_unanswered"] = unanswered
    of = played["ranker"]
    return {
        "prompts": len(of.probability),
        **result,
        "mean_tokens": mean_length(of.challenger_tokens),
        "base_mean_tokens": mean_length(of.opponent_tokens),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows of summary.json, for a person."""
    print("\nOn the held-out prompts. Win rates are against iteration 0, the first model.")
    print("\n".join(columns(summary_table(rows))))


def summary_table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The rows of summary.json as cells, under a line of names; iteration 0 is the first model. [] without rows."""
    rows = [row for row in rows if "prompts" in row]  # others hold benchmark suites alone
    if not rows:
        return []
    base = {"iteration": 0, **rows[0].get("base", {})}
    wins = [k for k in rows[0] if k.endswith("_win_rate")]
    measured = [k for k in rows[0].get("base", {}) if all(k in row for row in rows)]
    names = ["iteration", *wins, *measured, "loss", "beta2_loss"]
    shares = {*wins, *(k for k in measured if k not in _NO_SHARES and all(0 <= row[k] <= 1 for row in [base, *rows]))}
    return [names, *[[_cell(row.get(name), name in shares) for name in names] for row in [base, *rows]]]


def _cell(value: Any, is_share: bool) -> str:
    if value is None:
        return ""
    if is_share:
        return f"{100 * value:.1f}%"
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)
