"""The guard: says after which iteration a run fools its ranker, and which model is the best. It reads step.json files.

guard.json, in the run's directory, holds the curve of ranker and judge over the iterations, and what follows from it.
It is made of other files in a moment, as summary.json is, so it has no manifest.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.command.progress import columns
from sppo.evaluation.health import BOUNDS
from sppo.evaluation.match import iterations_of
from sppo.evaluation.step import name_of_judge, read_step
from sppo.models.files import public_name
from sppo.recipe import Recipe, read_yaml
from sppo.store.files import read_json, write_json

GUARD = "guard.json"
BEST = "best"  # the link to the best model in a run's directory
# prompts that a decision takes: of fewer a bootstrap's interval is much too narrow, and of one it has no width
FEWEST = 8
_SIGNS = {"empty": "are empty", "repeated": "repeat themselves", "cut": "are cut at --maxlen"}


def worse(step: dict[str, Any]) -> list[str]:
    """Why a step.json says that an iteration is worse than the one before, in words; [] where it does not say so.

    By the judge: its 95% interval is wholly below one half. By health: the share of the answers that are empty, repeat
    themselves or are cut is above BOUNDS, and rose against the first model, by a 95% interval wholly above 0. So a
    model whose answers were always cut does not stop a run. Of less than FEWEST prompts neither says so.
    """
    wins = step["against_before"]["judge"]
    low, high = wins["interval"]
    before = f"iteration {step['before']}" if step["before"] else "the first model"
    found = []
    if high < 0.5 and _judged(step) >= FEWEST:
        found.append(
            f"by the judge {step['judge']}, its answers win {_percent(wins['win_rate'])} of {wins['comparisons']} "
            f"comparisons with those of {before} (95% interval {_percent(low)} to {_percent(high)})"
        )
    for name, bound in BOUNDS.items():
        share, first = step["answers"][name], step["first_answers"][name]
        if share > bound and step["rises"][name][0] > 0 and step["prompts"] >= FEWEST:
            found.append(
                f"{_percent(share)} of its held-out answers {_SIGNS[name]}: more than {_percent(bound)}, and more than "
                f"the first model's {_percent(first)}"
            )
    return found


def _judged(step: dict[str, Any]) -> int:
    """Prompts on which the judge gave an answer."""
    return step["against_before"]["judge"].get("prompts", step["prompts"])  # older runs have all prompts' number alone


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def steps_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The step.json of each of the run's iterations that has one, in order.

    Left out is what the run makes again (see read_step), another judge's where the recipe names one, and what is behind
    --iterations: of an earlier command.
    """
    run_dir, judge = Path(recipe.run_dir), name_of_judge(recipe)
    found = (read_step(run_dir, i) for i in iterations_of(run_dir) if 0 < i <= recipe.iterations)
    return [step for step in found if step and judge in ("", step["judge"])]


def _read(path: Path) -> dict[str, Any]:
    """A file of JSON; {} where it is missing or damaged."""
    try:
        return read_json(path) if path.exists() else {}
    except SPPOError:
        return {}


def stop_of(recipe: Recipe) -> int | None:
    """The iteration after which the guard ends the run of a recipe, as far as it has come; None where it does not."""
    if recipe.stop_when != "judge":
        return None
    return next((step["iteration"] for step in steps_of(recipe) if worse(step)), None)


def as_last_asked(recipe: Recipe, given: Collection[str]) -> Recipe:
    """The recipe of a report by hand, which ends no run: whether it ends, and after how many iterations, is as the
    run's last command had it. given: the flags of the report itself, which win.
    """
    said = _read(Path(recipe.run_dir) / GUARD)
    was = {key: said[key] for key in ("stop_when", "iterations") if key in said and key not in given}
    asked = dataclasses.replace(recipe, **was)
    return dataclasses.replace(asked, iterations=max(asked.iterations, asked.iteration))


def update_guard(recipe: Recipe) -> dict[str, Any]:
    """Write guard.json of a recipe's run and return what is in it; {} without steps, and then there is no such file."""
    run_dir = Path(recipe.run_dir)
    path, steps = run_dir / GUARD, steps_of(recipe)
    if not steps:
        path.unlink(missing_ok=True)  # it would say of an earlier command's steps that they are the run's
        return {}
    stopped_at, are_worse = stop_of(recipe), [step["iteration"] for step in steps if worse(step)]
    best = steps[-1]["iteration"] if stopped_at is None else stopped_at - 1
    further = (run_dir / f"iter{i}" / "model" for i in range(best + 1, recipe.iterations + 1))
    # of a run that went on past a worse iteration, or without its judge, nothing is known to be the best
    is_known = stopped_at is not None or not (are_worse or any(model.is_dir() for model in further))
    model = f"iter{best}/model" if best else _first_model(run_dir)
    found = {
        "stop_when": recipe.stop_when,
        "iterations": recipe.iterations,
        "stopped_at": stopped_at,
        "why": [] if stopped_at is None else next(worse(step) for step in steps if step["iteration"] == stopped_at),
        "best": {"iteration": best, "model": model} if is_known else None,
        "worse": are_worse,
        "curve": [{**step, **_kl(run_dir, step["iteration"])} for step in steps],
    }
    if _read(path) != found:
        write_json(path, found)
    return found


def _kl(run_dir: Path, iteration: int) -> dict[str, float]:
    """The KL divergence from the first model, where --base_perplexity has measured it."""
    measured = _read(run_dir / f"iter{iteration}" / "eval" / "measures.json")
    return {key: measured[key] for key in ("kl",) if key in measured}


def _first_model(run_dir: Path) -> str:
    recipe = run_dir / "iter1" / "recipe.yaml"
    return read_yaml(recipe.read_text(encoding="utf-8")).get("model", "") if recipe.exists() else ""


def link_best(run_dir: Path, found: dict[str, Any]) -> None:
    """Let <run_dir>/best be a relative link to the best iteration's model; no link where that is the first model, or
    where nothing was found to be the best.

    What stands there and is no such link is left alone, with a note.
    """
    link, best = run_dir / BEST, found.get("best")
    target = best["model"] if best and best["iteration"] else ""
    there = os.readlink(link) if link.is_symlink() else ""
    if os.path.lexists(link) and not re.fullmatch(r"iter\d+/model", there):
        if target:
            said = "move it away to get a link to the best model there"
            print(f"guard: {link} is no link of this run's, so it stays as it is; {said}")
        return
    if there == target:
        return
    temporary = run_dir / f".{BEST}.tmp"  # the run's directory is locked
    try:
        if not target:
            link.unlink()
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
    except OSError as error:  # a disk without links
        print(f"guard: no link {link} to {target} could be made ({error}); nothing else needs it")


def said(found: dict[str, Any]) -> list[str]:
    """What a person should know of guard.json, in sentences; nothing where no iteration was worse."""
    stopped_at, best = found["stopped_at"], found["best"]
    lines = [f"Stopped after iteration {stopped_at}: {each}." for each in found["why"]]
    if stopped_at is not None:
        number, first = best["iteration"], f"the first model, {public_name(best['model'])}"
        lines.append(f"The best model is {f'that of iteration {number}' if number else first}.")
    elif found["worse"]:
        numbers = ", ".join(map(str, found["worse"]))
        lines.append(
            f"Worse than the iteration before, by the judge or by its answers' health: iteration {numbers}. "
            "--stop_when judge would have ended the run there."
        )
    undecided = [str(row["iteration"]) for row in found["curve"] if _judged(row) < FEWEST]
    if undecided and found["stop_when"] == "judge":
        numbers = ", ".join(undecided)
        lines.append(f"Not decided, because the judge answered on fewer than {FEWEST} prompts: iteration {numbers}.")
    return lines


def print_guard(found: dict[str, Any]) -> None:
    """guard.json, for a person."""
    print("\nEach iteration against the one before, on the held-out prompts: win rates with 95% intervals.")
    print("\n".join(columns(guard_table(found))))
    for line in said(found):
        print(f"guard: {line}")


def guard_table(found: dict[str, Any]) -> list[list[str]]:
    """The curve as cells, under a line of names; iteration 0 is the first model."""
    curve = found["curve"]
    with_kl = any("kl" in row for row in curve)
    names = ["iteration", "against", "ranker", curve[-1]["judge"], "same", "tied", "distinct_2", "overlap_2"]
    rows = [["0", "", "", "", "", "", *_diversity(curve[0]["first_answers"])]]
    for row in curve:
        against = row["against_before"]
        wins = [_wins(against[who]) for who in ("ranker", "judge")]
        shares = [_percent(against["agreement"][name]) for name in ("same", "tied")]
        rows.append([str(row["iteration"]), str(row["before"]), *wins, *shares, *_diversity(row["answers"])])
    if with_kl:
        names.append("kl")
        for cells, value in zip(rows, ["", *(f"{row['kl']:.3g}" if "kl" in row else "" for row in curve)], strict=True):
            cells.append(value)
    return [names, *rows]


def _wins(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{_percent(of['win_rate'])} ({100 * low:.1f} to {100 * high:.1f})"


def _diversity(answers: dict[str, Any]) -> list[str]:
    return ["" if (value := answers[name]) is None else f"{value:.3f}" for name in ("distinct_2", "overlap_2")]
