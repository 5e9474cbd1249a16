"""The guard: its figures by hand, when it stops, and that a run of the loop ends there, goes on, and says so again."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from test_page import Tables, make_run

from examples import demo
from sppo import iterations
from sppo.command.errors import SPPOError, UsageError
from sppo.evaluation import guard, measures
from sppo.evaluation.health import BOUNDS, repeats, words
from sppo.evaluation.match import Match, answers_of, match
from sppo.evaluation.matrix import interval
from sppo.evaluation.page.gather import gather
from sppo.evaluation.page.page import warnings, write_page
from sppo.evaluation.step import against, agreement, distinct_2, of_answers, overlap_2, rises, step_stage
from sppo.iterations import opened
from sppo.models.loading import load_causal_lm
from sppo.models.policy import open_policy
from sppo.preflight.generation import check_held_out
from sppo.preflight.verdict import open_run
from sppo.recipe import Recipe
from sppo.schema import responses_schema
from sppo.store.files import read_json, write_json
from sppo.store.manifest import Stage

# its figures, by hand


def played(rows: list[list[list[float]]], **lengths: Any) -> Match:
    probability = np.array(rows, np.float64)
    n, mine, theirs = probability.shape
    return Match(probability, lengths.get("mine", np.ones((n, mine))), lengths.get("theirs", np.ones((n, theirs))))


def test_the_agreement_of_two_judges_by_hand() -> None:
    """Of 8 pairs: 3 alike, 2 not, and 3 with a tie, of which one is the ranker's, one the judge's and one of both."""
    ranker = played([[[0.9, 0.8], [0.1, 0.7]], [[0.2, 0.5], [0.6, 0.5]]])
    judge = played([[[1.0, 0.6], [0.0, 0.1]], [[0.9, 1.0], [0.5, 0.5 + 1e-9]]])
    assert agreement(ranker, judge) == {
        "pairs": 8, "same": 0.375, "apart": 0.25, "tied": 0.375, "ranker_tied": 0.25, "judge_tied": 0.25,
    }  # fmt: skip


def test_pairs_that_nobody_was_asked_about_are_no_agreement() -> None:
    """A response without an answer loses by rule, and a judge that gave no answer has no opinion."""
    lengths = {"mine": np.array([[5.0, np.nan]])}
    ranker = played([[[0.9, 0.8], [0.0, 0.0]]], **lengths)
    judge = played([[[0.8, np.nan], [0.0, 0.0]]], **lengths)
    found = agreement(ranker, judge)
    assert (found["pairs"], found["same"], found["apart"], found["tied"]) == (1, 1.0, 0.0, 0.0)
    none = agreement(played([[[np.nan]]]), played([[[0.5]]]))
    assert (none["pairs"], none["same"], none["tied"]) == (0, 0.0, 0.0)


def test_both_win_rates_have_intervals_and_their_number_of_comparisons() -> None:
    found = against(played([[[0.75]], [[0.25]]] * 50), played([[[1.0]], [[np.nan]]] * 50))
    assert found["ranker"]["win_rate"] == 0.5
    low, high = found["ranker"]["interval"]
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.006)  # deviation 0.25 of 100
    assert found["ranker"]["comparisons"] == 100
    assert found["ranker"]["prompts"] == 100
    assert found["judge"] == {"win_rate": 1.0, "interval": [1.0, 1.0], "comparisons": 50, "prompts": 50}


def test_prompts_that_a_judge_said_nothing_about_decide_nothing() -> None:
    """Ten of 150 were answered: their interval is that of the ten, as if the others were not there."""
    rows = np.full((150, 1, 1), np.nan)
    rows[:10, 0, 0] = [0.3, 0.6] * 5
    assert interval(rows) == interval(rows[:10])


def test_a_judge_without_any_answer_is_named(tmp_path: Path) -> None:
    for i in (0, 1):
        row = {"prompt_id": "p0", "prompt": [{"role": "user", "content": "Why?"}], "responses": [response(f"say {i}")]}
        answers_of(tmp_path, i).parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row], schema=responses_schema()), answers_of(tmp_path, i))
    judge = Recipe(ranker="test_guard:silent", ranker_backend="function", judge="test_guard:silent")
    for _ in range(2):  # also where the comparison is there already
        with pytest.raises(SPPOError, match="--judge test_guard:silent: .* for no pair .* again: .* --overwrite"):
            match(judge, "silent", tmp_path, 0, 1)


def silent(prompt: str, first: str, second: str) -> float:
    return math.nan


def test_distinct_2_by_hand() -> None:
    """`a red ball` and `A red kite`: the bigrams a-red, red-ball, a-red, red-kite; three of four are different ones."""
    assert distinct_2(["a red ball", "A red kite"]) == 0.75
    assert distinct_2(["a red ball"] * 4) == 0.25
    assert distinct_2(["yes", ""]) is None


def test_where_no_spaces_part_words_each_letter_is_one() -> None:
    """Two Chinese sentences of six letters and a full stop each: of their 6 bigrams, 4 are in both."""
    blue, grey = "天空是蓝色的。", "天空是灰色的。"
    assert words("Ein BLAUER  Ball\n") == ["ein", "blauer", "ball"]
    assert words("GPT 是模型。") == ["gpt", "是", "模", "型", "。"]
    assert distinct_2([blue, grey]) == pytest.approx(8 / 12)
    assert overlap_2([[blue, grey]]) == pytest.approx(4 / 8)
    assert repeats("我很高兴认识你" * 20)
    assert repeats("ฉันชอบกินข้าว" * 20)
    assert not repeats("天空之所以是蓝色的，是因为阳光进入大气层以后，波长较短的蓝光比红光更容易被空气分子散射。")


def test_overlap_2_by_hand() -> None:
    """Of one prompt three answers: 1 of 3 bigrams in common, then 0 of 4 twice; of the other two equal ones."""
    assert overlap_2([["a red ball", "a red kite", "two dogs sit"]]) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert overlap_2([["a red ball", "a red kite", "two dogs sit"], ["so it is"] * 2]) == pytest.approx((1 / 3 + 1) / 4)
    assert overlap_2([["yes", "yes", "no"]]) == pytest.approx(1 / 3)  # no bigrams
    assert overlap_2([["one answer alone"]]) is None


def response(text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"text": text, "token_ids": [1] * max(len(text.split()), 1), "finish_reason": finish, **more}


def test_what_is_said_of_answers_leaves_thoughts_without_an_end_out() -> None:
    answered = {
        "p0": [response("a red ball"), response("a red kite", "length")],
        "p1": [response(" "), response("", "length", thought_tokens=1)],
    }
    assert of_answers(answered) == {
        "distinct_2": 0.75, "overlap_2": pytest.approx(1 / 3, abs=1e-4), "empty": 0.25, "repeated": 0.0, "cut": 0.5,
    }  # fmt: skip


def test_a_rise_is_measured_prompt_by_prompt() -> None:
    """Each prompt has one cut answer more than before: no doubt. In one of 60 prompts alone: it may be chance."""
    whole = {f"p{i}": [response("a"), response("b")] for i in range(60)}
    half = {key: [response("a", "length"), response("b")] for key in whole}
    assert rises(whole, half)["cut"] == [0.5, 0.5]
    assert rises(half, half)["cut"] == [0.0, 0.0]
    low, high = rises(whole, {**whole, "p7": [response("a", "length"), response("b")]})["cut"]
    assert low == 0
    assert high == pytest.approx(0.025, abs=0.01)


BAD = (0.3, 0.4)  # an interval of the judge's


def step(iteration: int, interval: tuple[float, float] = (0.5, 0.7), **more: Any) -> dict[str, Any]:
    """A step.json. more: share, the first model's share, and how far the rise's interval begins above 0, of a sign."""
    healthy = {"distinct_2": 0.5, "overlap_2": 0.25, **dict.fromkeys(BOUNDS, 0.0)}
    answers, first, rise = dict(healthy), dict(healthy), {name: [0.0, 0.0] for name in BOUNDS}
    for name, (share, base, low) in more.items():
        answers[name], first[name], rise[name] = share, base, [low, 1.0]
    wins = {"win_rate": sum(interval) / 2, "interval": list(interval), "comparisons": 2400, "prompts": 150}
    agreeing = {"pairs": 2400, "same": 0.6, "apart": 0.3, "tied": 0.1, "ranker_tied": 0.1, "judge_tied": 0.0}
    of = {"ranker": {**wins, "win_rate": 0.8, "interval": [0.7, 0.9]}, "judge": wins, "agreement": agreeing}
    return {
        **{"iteration": iteration, "before": iteration - 1, "judge": "examples.demo:brief", "prompts": 150},
        **{"against_before": of, "against_first": of, "answers": answers, "first_answers": first, "rises": rise},
    }


@pytest.mark.parametrize(
    ("made", "is_worse"),
    [
        (step(2, (0.40, 0.4999)), True),
        (step(2, (0.40, 0.5)), False),  # it reaches one half
        (step(2, (0.30, 0.51)), False),
        (step(2, (0.51, 0.6)), False),
        (step(2, cut=(0.21, 0.0, 0.01)), True),
        (step(2, cut=(0.2, 0.0, 0.1)), False),  # at the bound
        (step(2, cut=(0.9, 0.9, 0.0)), False),  # it was always cut
        (step(2, cut=(0.9, 0.8, 0.02)), True),
        (step(2, repeated=(0.11, 0.0, 0.05)), True),
        (step(2, repeated=(0.1, 0.0, 0.05)), False),
        (step(2, empty=(0.021, 0.0, 0.001)), True),
        (step(2, empty=(0.02, 0.0, 0.001)), False),
    ],
)
def test_when_an_iteration_is_worse(made: dict[str, Any], is_worse: bool) -> None:
    assert bool(guard.worse(made)) is is_worse


def test_few_prompts_decide_nothing() -> None:
    """Of one prompt a bootstrap's interval has no width, so that every second iteration would be worse."""
    for made in (step(2, (0.3, 0.4)), step(2, cut=(0.9, 0.0, 0.5))):
        made["prompts"] = made["against_before"]["judge"]["prompts"] = guard.FEWEST
        assert guard.worse(made)
        made["prompts"] = made["against_before"]["judge"]["prompts"] = guard.FEWEST - 1
        assert not guard.worse(made)
    made = step(2, (0.3, 0.4))
    made["against_before"]["judge"]["prompts"] = 2  # the judge answered for no more
    assert not guard.worse(made)
    found = {"stop_when": "judge", "stopped_at": None, "worse": [], "why": [], "best": {"iteration": 2, "model": "m"}}
    said = "Not decided, because the judge answered on fewer than 8 prompts: iteration 2."
    assert guard.said({**found, "curve": [step(1), made]}) == [said]
    assert guard.said({**found, "curve": [step(1), made], "stop_when": "none"}) == []


def test_the_preflight_refuses_a_guard_that_could_never_decide(tmp_path: Path) -> None:
    held_out = tiny.write_jsonl(tmp_path / "h.jsonl", [{"prompt": f"Why {i}?"} for i in range(guard.FEWEST - 1)])
    recipe = Recipe(eval_prompts=str(held_out), judge="examples.demo:brief")
    assert [each.level for each in check_held_out(recipe, None, None)] == ["ok"]
    found, _ = check_held_out(replace(recipe, stop_when="judge"), None, None)
    assert found.level == "no"
    assert "7 can be answered, and --stop_when judge decides on 8 or more" in found.text


def put(run: Path, number: int, made: dict[str, Any]) -> None:
    """A step.json as a run writes it, with its manifest, of the answers that are there."""
    for i in (0, number - 1, number):
        answers_of(run, i).parent.mkdir(parents=True, exist_ok=True)
        if not answers_of(run, i).exists():
            answers_of(run, i).write_text(f"answers of {i}")
    stage = step_stage(Recipe(ranker="examples.demo:longer", judge=made["judge"]), run, number)
    stage.discard()
    stage.begin()
    write_json(stage.outputs[0], made)
    stage.finish({})


def run_of(directory: Path, *steps: dict[str, Any]) -> Path:
    for number, made in enumerate(steps, 1):
        put(directory, number, made)
        (directory / f"iter{number}" / "model").mkdir()
    (directory / "iter1" / "recipe.yaml").write_text("model: org/first\n")
    return directory


def test_the_best_is_the_last_one_before_the_first_that_is_worse(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", step(1), step(2), step(3, BAD), step(4))
    recipe = Recipe(run_dir=str(run), stop_when="judge", iterations=4)
    found = guard.update_guard(recipe)
    assert (found["stopped_at"], found["best"]) == (3, {"iteration": 2, "model": "iter2/model"})
    assert found == read_json(run / "guard.json")
    assert found["why"] == [
        "by the judge examples.demo:brief, its answers win 35.0% of 2400 comparisons with those of iteration 2 (95% "
        "interval 30.0% to 40.0%)"
    ]
    guard.link_best(run, found)
    assert os.readlink(run / "best") == "iter2/model"
    shutil.move(run, tmp_path / "moved")  # the link is relative
    run = tmp_path / "moved"
    assert (run / "best").resolve() == run / "iter2" / "model"

    on = guard.update_guard(Recipe(run_dir=str(run), stop_when="none", iterations=4))
    assert (on["stopped_at"], on["best"], on["worse"], on["why"]) == (None, None, [3], [])
    guard.link_best(run, on)
    assert not (run / "best").is_symlink()
    assert guard.stop_of(Recipe(run_dir=str(run), stop_when="judge", iterations=2)) is None
    (run / "iter3" / "eval" / "step.json").write_text('{"iter')  # a run makes it again
    (run / "guard.json").write_text("{")
    assert guard.update_guard(Recipe(run_dir=str(run), stop_when="judge", iterations=4))["stopped_at"] is None


def test_where_the_first_iteration_is_worse_the_first_model_is_named_and_no_link_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, step(1, (0.2, 0.3)))
    (run / "best").symlink_to("iter1/model")  # of an earlier end of the run
    found = guard.update_guard(Recipe(run_dir=str(run), stop_when="judge"))
    guard.link_best(run, found)
    assert not (run / "best").is_symlink()
    guard.print_guard(found)
    assert "guard: The best model is the first model, org/first." in capsys.readouterr().out
    guard.link_best(run, {})  # nor where there is no guard
    assert capsys.readouterr().out == ""
    first_is_best = {**found, "best": {"iteration": 1, "model": "iter1/model"}}
    (run / "best").mkdir()  # a user's own
    guard.link_best(run, first_is_best)
    assert "is no link of this run's, so it stays as it is" in capsys.readouterr().out
    assert not (run / "best").is_symlink()
    (run / "best").rmdir()
    (run / "best").symlink_to(tmp_path.parent / "elsewhere")  # a user's own too, and its end may be away
    for each in (first_is_best, {}):
        guard.link_best(run, each)
        assert os.readlink(run / "best") == str(tmp_path.parent / "elsewhere")
    assert "is no link of this run's" in capsys.readouterr().out


def test_what_an_earlier_command_left_behind_the_last_iteration_is_not_the_runs(tmp_path: Path) -> None:
    """Three iterations were made, and the third is worse. A command that asks for two knows no third."""
    run = run_of(tmp_path, step(1), step(2), step(3, BAD))
    found = guard.update_guard(Recipe(run_dir=str(run), stop_when="judge", iterations=2))
    assert (found["stopped_at"], found["best"]["iteration"], found["worse"]) == (None, 2, [])
    assert [row["iteration"] for row in found["curve"]] == [1, 2]


def test_a_model_that_no_judge_has_seen_is_not_called_the_best(tmp_path: Path) -> None:
    run = run_of(tmp_path, step(1))
    (run / "iter2" / "model").mkdir(parents=True)
    assert guard.update_guard(Recipe(run_dir=str(run), iterations=1))["best"]["iteration"] == 1
    assert guard.update_guard(Recipe(run_dir=str(run), iterations=2))["best"] is None


def test_another_judges_figures_and_those_of_other_answers_decide_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, step(1), {**step(2, BAD), "judge": "examples.demo:rule"}, step(3))
    brief = Recipe(run_dir=str(run), stop_when="judge", judge="examples.demo:brief", eval_prompts="h", gpus="none")
    rule = replace(brief, judge="examples.demo:rule")
    assert (guard.stop_of(brief), guard.stop_of(rule)) == (None, 2)
    assert [row["iteration"] for row in guard.update_guard(brief)["curve"]] == [1, 3]
    # the preflight looks at all that is left for the judge that is asked
    assert [each.number for each in open_run(brief).left] == [1, 2, 3]
    assert [each.number for each in open_run(rule).left] == [1, 2]

    put(run, 2, step(2, BAD))
    assert guard.stop_of(brief) == 2
    answers_of(run, 1).write_text("answers to other prompts")
    assert guard.stop_of(brief) is None
    assert [row["iteration"] for row in guard.update_guard(brief)["curve"]] == [3]
    put(run, 1, step(1))
    (run / "iter3" / "eval" / "step.json").write_text(json.dumps(step(3, BAD)))  # edited
    assert [each["iteration"] for each in guard.steps_of(brief)] == [1]


def test_a_run_that_goes_on_without_its_judge_is_not_said_to_be_stopped(tmp_path: Path) -> None:
    run = run_of(tmp_path, step(1), step(2, BAD))
    asked = Recipe(run_dir=str(run), stop_when="judge", judge="examples.demo:brief")
    assert guard.update_guard(asked)["stopped_at"] == 2
    (run / "iter3" / "model").mkdir(parents=True)
    found = guard.update_guard(Recipe(run_dir=str(run)))
    assert (found["stopped_at"], found["best"]) == (None, None)

    guard.update_guard(asked)
    for path in run.glob("iter*/eval/step.json"):
        path.unlink()
    assert guard.update_guard(Recipe(run_dir=str(run))) == {}
    assert not (run / "guard.json").exists()


def test_a_report_by_hand_ends_a_run_as_its_last_command_did(tmp_path: Path) -> None:
    """The first iteration's recipe may be that of an earlier command, for fewer iterations and without a guard."""
    run = run_of(tmp_path, step(1), step(2, BAD), step(3))
    first = Recipe(run_dir=str(run), iterations=1, iteration=3)
    assert guard.as_last_asked(first, {}).iterations == 3
    guard.update_guard(replace(first, stop_when="judge", iterations=4))
    asked = guard.as_last_asked(first, {})
    assert (asked.stop_when, asked.iterations, guard.update_guard(asked)["stopped_at"]) == ("judge", 4, 2)
    assert guard.as_last_asked(first, {"stop_when": "none"}).stop_when == "none"


def test_behind_what_is_made_again_the_guard_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was stopped after 2, and a file of the first report is gone: 3 must not be made without a look at 2."""
    run = run_of(tmp_path, step(1), step(2, BAD))
    whole: set[int] = {1, 2}

    def stages(recipe: Recipe, *_: Recipe) -> iterations.Stages:
        yield [Stage("s", tmp_path / "none", [], {}, {})] if recipe.iteration not in whole else []

    for name in ("data_stages", "training_stages", "report_stages"):
        monkeypatch.setattr(iterations, name, stages)
    asked = Recipe(model="m", run_dir=str(run), stop_when="judge", judge="examples.demo:brief", eval_prompts="h")

    def left(recipe: Recipe) -> list[int]:
        recipes = [iterations.iteration(recipe, number) for number in (1, 2, 3)]
        return [each.iteration for each in iterations.left(recipes, recipe)]

    assert left(asked) == []
    assert left(replace(asked, stop_when="none")) == [3]
    whole.remove(1)
    assert left(asked) == [1, 2, 3]
    assert left(replace(asked, stop_when="none")) == [1, 3]


# In the place of Python: plan.py plans what $PLANNED holds, and each script says its name.
STAND_IN = """#!/usr/bin/env bash
echo "ran ${1##*/} ${!#}"
for word in "$@"; do case $word in --plan=*) [[ $1 != */plan.py ]] || cat "$PLANNED" > "${word#--plan=}" ;; esac; done
"""


@pytest.mark.parametrize(("stop_when", "goes_on"), [("judge", False), ("none", True)])
def test_the_loop_ends_by_guard_json_only_where_it_is_asked_to(tmp_path: Path, stop_when: str, goes_on: bool) -> None:
    """One of an earlier command's may be there: a run without held-out prompts writes none."""
    run = run_of(tmp_path / "run", step(1), step(2, BAD))
    guard.update_guard(Recipe(run_dir=str(run), stop_when="judge"))
    recipes = [run / f"iter{i}" / "recipe.yaml" for i in (1, 2, 3)]
    for path in recipes:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"evaluate": False, "stop_when": stop_when}))
    (tmp_path / "planned").write_text("".join(f"{line}\n" for line in (run, "digest", *recipes)))
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    said = tiny.succeed("scripts/run.sh", PYTHON=str(tmp_path / "python"), PLANNED=str(tmp_path / "planned"))
    assert f"ran report.py {recipes[1]}" in said
    assert (f"ran report.py {recipes[2]}" in said) is goes_on


def test_the_page_shows_the_curve_and_says_first_that_the_run_was_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Ranker and judge" not in Tables(write_page(run).read_text()).found  # a run without a second judge
    for number, made in enumerate((step(1), step(2, BAD)), 1):
        put(run, number, made)
    (run / "iter2" / "eval" / "measures.json").write_text('{"kl": 1.25}')
    guard.update_guard(Recipe(run_dir=str(run), stop_when="judge"))
    page = write_page(run).read_text()
    assert Tables(page).found["Ranker and judge"] == [
        ["iteration", "against", "ranker", "examples.demo:brief", "same", "tied", "distinct_2", "overlap_2", "kl"],
        ["0", "", "", "", "", "", "0.500", "0.250", ""],
        ["1", "0", "80.0% (70.0 to 90.0)", "60.0% (50.0 to 70.0)", "60.0%", "10.0%", "0.500", "0.250", ""],
        ["2", "1", "80.0% (70.0 to 90.0)", "35.0% (30.0 to 40.0)", "60.0%", "10.0%", "0.500", "0.250", "1.25"],
    ]
    for title in ("Wins against the iteration before", "Variety of the answers", "KL divergence from the first model"):
        assert f'aria-label="{title}"' in page
    assert warnings(gather(run))[:2] == [f"Stopped after iteration 2: {guard.worse(step(2, (0.3, 0.4)))[0]}.",
                                         "The best model is that of iteration 1."]  # fmt: skip


def test_settings_that_the_guard_cannot_work_with_are_refused() -> None:
    alone = Recipe(model="m", stop_when="judge")
    for wrong, said in (
        (alone, "--stop_when judge needs --judge, .* and --eval_prompts"),
        (replace(alone, eval_prompts="p.jsonl"), "--stop_when judge needs --judge"),
        (replace(alone, judge="examples.demo:rule"), "--judge needs --eval_prompts"),
    ):
        with pytest.raises(UsageError, match=said):
            opened(wrong)


# KL divergence, against transformers alone


def test_kl_by_transformers_alone(models: Path) -> None:
    """The mean over answers of the difference of two sums of log-probs; a thought is read and not counted."""
    rows = [
        {"prompt_token_ids": [5, 6, 7], "responses": [{"token_ids": [8, 9, 10, 11]}, {"token_ids": [12]}]},
        {"prompt_token_ids": [5], "responses": [{"token_ids": [8, 9, 4], "thought_tokens": 2}, {"token_ids": []}]},
    ]
    base, model = str(models / "llama3"), str(models / "mistral")
    found = measures._under_the_base(Recipe(), base, model, rows)
    apart, total = [], 0.0
    networks = [load_causal_lm(open_policy(name), torch.float32).eval() for name in (model, base)]
    for read, answer in (([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [12]), ([5, 8, 9], [4])):
        sums = []
        for network in networks:
            with torch.inference_mode():
                logps = network(input_ids=torch.tensor([read + answer])).logits.log_softmax(-1)[0]
            sums.append(sum(logps[len(read) - 1 + i, token].item() for i, token in enumerate(answer)))
        apart.append(sums[0] - sums[1])
        total += sums[1]
    assert found["kl"] == pytest.approx(sum(apart) / 3, rel=1e-4)
    assert found["base_perplexity"] == pytest.approx(math.exp(-total / 6), rel=1e-4)
    assert measures._under_the_base(Recipe(), base, base, rows)["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in measures._under_the_base(Recipe(), base, "", rows)


# the loop

# A judge that recognises each iteration's held-out answers: each is better than the one before, but for the second.
JUDGE = """
import functools, os
from pathlib import Path
import pyarrow.parquet as pq

WORTH = {0: 0.0, 1: 1.0, 2: -1.0, 3: 2.0}

@functools.cache
def worth():
    found = {}
    for i, worth in WORTH.items():
        path = Path(os.environ["GUARDED"]) / f"iter{i}" / "eval" / "responses.parquet"
        for row in pq.read_table(path)["responses"].to_pylist() if path.exists() else ():
            found.update({response["text"]: worth for response in row})
    return found

def recognises(prompt, a, b):
    return 9.0 * (worth().get(a, 0.0) - worth().get(b, 0.0))
"""


def files(run: Path) -> dict[str, int]:
    """When each file was written, but for logs and locks."""
    found = {str(p.relative_to(run)): p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    return {name: time for name, time in found.items() if "lock" not in name and not name.endswith(".log")}


@pytest.mark.slow
def test_a_run_ends_where_the_judge_says_so_and_goes_on_where_it_is_told_to(
    models: Path, tmp_path: Path, warm: str
) -> None:
    """The answers of these models are always cut, which is no reason to stop."""
    run = tmp_path / "run"
    (tmp_path / "knows.py").write_text(JUDGE)
    cold = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent}", "GUARDED": str(run)}
    env = {**cold, "PYTHON": warm}
    words = ["scripts/run.sh", "--recipe=recipes/sppo/demo.yaml", f"--model={models / 'llama3'}", "--gpus=none"]
    words += [f"--prompts={tiny.write_jsonl(tmp_path / 'p.jsonl', [{'prompt': f'Why {i}?'} for i in range(6)])}"]
    words += ["--pairs=3", "--maxlen=12", "--engine=transformers", "--ranker=tiny:longer", f"--run_dir={run}"]
    held_out = tiny.write_jsonl(tmp_path / "h.jsonl", [{"prompt": f"What is {i}?"} for i in range(8)])
    judged = [f"--eval_prompts={held_out}", "--judge=knows:recognises", "--evaluate", "--base_perplexity"]
    words += ["--learning_rate=1e-3", "--batch_size=2", "--global_batch_size=2"]
    asked = [*words, *judged, "--stop_when=judge"]

    # what cannot work is refused before anything is written
    for wrong, said in (([judged[1]], "--judge needs --eval_prompts"), (judged[:1], "--stop_when judge needs --judge")):
        refused = tiny.run(*words, *wrong, "--stop_when=judge", **env)
        assert (refused.returncode, said in refused.stderr) == (2, True), refused.stderr
    assert not run.exists()

    # one iteration, which is better than the first model; then killed in the second one's report
    assert "done: the last model is" in tiny.succeed(*asked, "--iterations=1", **env)
    assert os.readlink(run / "best") == "iter1/model"
    assert read_json(run / "guard.json")["stopped_at"] is None
    process = tiny.start("bash", *asked, slow=run / "iter2" / "eval", log=tmp_path / "log", **cold)

    def comparing() -> bool:
        return any((run / "iter2" / "eval").glob("against-iter1-*"))

    tiny.wait_until(lambda: comparing() or process.poll() is not None, 900)  # a whole iteration comes before it
    tiny.kill_when(process, comparing, tmp_path)
    ended = tiny.succeed(*asked, **env)
    stopped = "guard: Stopped after iteration 2: by the judge knows:recognises, its answers win 0.0% of 128 comparisons"
    assert stopped in ended
    assert f"done: stopped after iteration 2; the best model is {run / 'iter1' / 'model'}" in ended
    assert os.readlink(run / "best") == "iter1/model"
    assert not (run / "iter3" / "data").exists()
    found = read_json(run / "guard.json")
    assert [row["answers"]["cut"] > BOUNDS["cut"] for row in found["curve"]] == [True, True]
    rates = [row["against_before"]["judge"]["win_rate"] for row in found["curve"]]
    assert rates == pytest.approx([1.0, 0.0], abs=1e-3)
    assert all(row["kl"] > 0 for row in found["curve"])
    for row in read_json(run / "summary.json"):  # the same comparisons as the report's
        assert row["recognises_win_rate"] == found["curve"][row["iteration"] - 1]["against_first"]["judge"]["win_rate"]

    # the same again: it says the same, and nothing is made
    before = files(run)
    again = tiny.succeed(*asked, **env)
    assert stopped in again
    assert "=== iteration" not in again
    assert "stopped after iteration 2, as --stop_when judge asks" in again
    assert files(run) == before

    # a run of older code has none of these files: it has its page, and gets them
    for path in [*run.glob("iter*/eval/step.*"), run / "guard.json", run / "best"]:
        path.unlink()
    assert "Ranker and judge" not in Tables(write_page(run).read_text()).found
    tiny.succeed(*asked, **env)
    assert read_json(run / "guard.json") == found
    kept = {name: time for name, time in files(run).items() if name.endswith((".parquet", ".safetensors"))}
    assert kept.items() <= before.items()

    # without the guard it goes on; with it again, it ended there
    on = tiny.succeed(*words, *judged, "--stop_when=none", **env)
    assert "=== iteration 3: train" in on
    assert "=== iteration 2: train" not in on
    assert "--stop_when judge would have ended the run there" in on
    assert not (run / "best").is_symlink()  # nothing says that iteration 3 is better than iteration 1
    before = files(run)
    assert stopped in tiny.succeed(*asked, **env)
    assert os.readlink(run / "best") == "iter1/model"
    changed = {name for name, time in files(run).items() if before.get(name) != time}
    assert changed <= {"guard.json", "report.html"}


def turns(run: Path) -> list[tuple[float, float]]:
    """By the answers alone: the mean of P that an iteration's beats one of the iteration before, by `brief`'s rule, and
    1.96 standard errors over prompts; of each iteration."""

    def worth(text: str) -> float:
        words = text.split()
        return sum(w.strip(".,!?").lower() in demo.COLOURS for w in words) - max(0, len(words) - 16) / 2

    def worths(iteration: int) -> dict[str, list[float]]:
        rows = pq.read_table(run / f"iter{iteration}" / "eval" / "responses.parquet").to_pylist()
        return {row["prompt_id"]: [worth(r["text"]) for r in row["responses"]] for row in rows}

    found, count = [], len(list(run.glob("iter*/eval/responses.parquet")))
    for iteration in range(1, count):
        old, new = worths(iteration - 1), worths(iteration)
        each = [np.mean([(a > b) + (a == b) / 2 for a in new[key] for b in old[key]]) for key in old]
        found.append((float(np.mean(each)), float(1.96 * np.std(each) / len(each) ** 0.5)))
    return found


@pytest.mark.slow
def test_a_ranker_that_likes_length_is_found_out_at_the_iteration_where_the_rule_turns(
    tmp_path: Path, warm: str
) -> None:
    """The demo's model learns length from it. That brings colour words too, until the answers are too long."""
    run = tmp_path / "run"
    demo.make_demo(tmp_path / "world", 42, ranker=False)
    ended = tiny.succeed(
        "scripts/run.sh", "--recipe=recipes/sppo/demo.yaml", f"--model={tmp_path / 'world' / 'policy'}",
        f"--prompts={tmp_path / 'world' / 'train.jsonl'}", "--split_prompts", "--iterations=5", "--gpus=none",
        "--ranker=examples.demo:longer", f"--eval_prompts={tmp_path / 'world' / 'heldout.jsonl'}",
        "--judge=examples.demo:brief", "--stop_when=judge", f"--run_dir={run}", PYTHON=warm,
    )  # fmt: skip
    found, by_hand = read_json(run / "guard.json"), turns(run)
    first_worse = next(i for i, (rate, error) in enumerate(by_hand, 1) if rate + error < 0.5)
    assert found["stopped_at"] == first_worse
    assert first_worse in (2, 3)
    assert f"done: stopped after iteration {first_worse}" in ended
    assert os.readlink(run / "best") == f"iter{first_worse - 1}/model"
    for row, (rate, error) in zip(found["curve"], by_hand, strict=True):
        wins = row["against_before"]
        assert wins["judge"]["win_rate"] == pytest.approx(rate, abs=1e-3)
        assert wins["judge"]["interval"] == pytest.approx([rate - error, rate + error], abs=0.01)
        assert wins["ranker"]["interval"][0] > 0.5  # it is fooled to the end
    assert len(list(run.glob("iter*/data/train.parquet"))) == first_worse
