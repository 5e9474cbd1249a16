"""AlpacaEval 2: annotations that are replayed give the win rate worked out by hand, and SPPO's own rows stand beside.

The annotations of the first test are made up. ALPACA_ANNOTATIONS=FILE replays published ones (docs/evaluation.md).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import pandas as pd
import pytest
import tiny
from alpaca_eval import constants
from alpaca_eval.metrics import get_length_controlled_winrate
from stub_server import Stub, says

from sppo.evaluation.page.page import write_page
from sppo.evaluation.suites import alpaca_eval
from sppo.evaluation.suites.suite import Order
from sppo.recipe import Recipe
from sppo.store.files import read_json

Annotation = dict[str, Any]  # as alpaca-eval publishes them: instruction, output_1, preference, raw_completion and more
PUBLISHED = os.environ.get("ALPACA_ANNOTATIONS", "")
MISTRAL, ROW = "mistralai/Mistral-7B-Instruct-v0.2", "SPPO-Mistral7B-PairRM"
# how likely the judge finds our answer the better one; None: it names no answer
PROBABILITIES = [1.0, 0.9, 0.9, None, 0.9, 0.8, 0.7, 0.5, 0.2, 0.1, 0.0]
# in alpaca-eval's prompt: an answer between its name and the end of its block
ANSWER = r'"model_identifier": "{}",\n        "output": """(.*?)"""\n    }}'


@pytest.mark.slow
def test_made_up_annotations_give_the_win_rate_worked_out_by_hand(
    tmp_path: Path, stub: tuple[type[Stub], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of ten P(our answer) is 0.6; their squared deviations add up to 1.26, so the error is √(1.26/9/10)."""
    annotations = [
        {"instruction": f"Name {n} rivers of {{Europe}}.", "output_1": "The Po" + ", the Po" * n, "generator_1": "gpt4",
         "preference": None if p is None else 1 + p}
        for n, p in enumerate(PROBABILITIES)
    ]  # fmt: skip
    said, names = replay(annotations, tmp_path, *stub)
    assert names == {"m", "M"}  # the package shows our answer first for some questions, second for others
    made = read_json(tmp_path / "mine/iter3/suites/alpaca_eval/figures.json")
    found, published = made["figures"], made["published"][ROW]
    assert found["win_rate_percent"] == 60
    assert found["win_rate_standard_error"] == round(100 * math.sqrt(1.26 / 9 / 10), 4) == 11.8322
    assert (found["judged"], found["not_judged"]) == (10, 1)
    # at equal length: as the package alone finds it, which takes the gamed answers from the Hub's cache
    monkeypatch.setattr(constants, "DEFAULT_CACHE_DIR", str(tmp_path / "home/hub"))
    kept = pd.DataFrame(read_json(tmp_path / "mine/iter3/suites/alpaca_eval/annotations.json"))
    theirs = get_length_controlled_winrate(kept, save_weights_dir=None)["length_controlled_winrate"]
    assert found["length_controlled_win_rate_percent"] == pytest.approx(theirs, abs=1e-3)
    # the leaderboard's row, which has no standard error at equal length
    assert published == {
        "win_rate_percent": 32.2453, "win_rate_standard_error": 1.3908, "length_controlled_win_rate_percent": 30.4941,
        "mean_characters": 2114,
    }  # fmt: skip
    assert f"win_rate_percent: 60 (published of {ROW}: 32.2453)" in said
    page = write_page(tmp_path / "mine").read_text()
    assert f"<th>iteration 3</th><th>published: {ROW}</th>" in page
    assert "<td>win_rate_percent</td><td>60</td><td>32.25</td>" in page


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED, reason="ALPACA_ANNOTATIONS names no file of published annotations")
def test_published_annotations_give_the_published_win_rate(tmp_path: Path, stub: tuple[type[Stub], str]) -> None:
    """All of the leaderboard's figures but those at equal length, for which alpaca-eval takes a file of the Hub."""
    annotations: list[Annotation] = json.loads(Path(PUBLISHED).read_text())
    replay(annotations, tmp_path, *stub)
    found = read_json(tmp_path / "mine/iter3/suites/alpaca_eval/figures.json")["figures"]
    leaderboard = constants.ALPACAEVAL_2_LEADERBOARD_PATHS / "weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
    row = pd.read_csv(leaderboard, index_col=0).loc[annotations[0]["generator_2"]]
    assert found["judged"] == row["n_total"]
    assert found["win_rate_percent"] == round(row["win_rate"], 4)
    assert found["win_rate_standard_error"] == round(row["standard_error"], 4)


def replay(annotations: list[Annotation], here: Path, server: type[Stub], url: str) -> tuple[str, set[str]]:
    """What the suite's command says of here/mine/iter3/model, of a run that began with Mistral, with this judge.

    With it: by which names the judge saw our answers. The suite's own questions are those of the annotations.
    """
    model = here / "mine/iter3/model"
    tiny.llama3(model)
    (model / "config.json").write_text(json.dumps(read_json(model / "config.json") | {"max_position_embeddings": 4096}))
    (here / "mine/iter1").mkdir()
    (here / "mine/iter1/recipe.yaml").write_text(f"model: {MISTRAL}\n")
    questions = here / "hub"
    questions.mkdir()
    rows = [{"instruction": a["instruction"], "output": a["output_1"], "generator": "gpt4"} for a in annotations]
    (questions / alpaca_eval.REFERENCE).write_text(json.dumps(rows))
    (questions / alpaca_eval.GAMED).write_text(gamed(len(rows)))

    by_instruction, names = {a["instruction"]: a for a in annotations}, set[str]()
    server.models = [{"id": alpaca_eval.JUDGE, "object": "model"}]
    server.behave = lambda n: (200, judged(server.asked[n]["messages"][-1]["content"], by_instruction, names.add))
    with hub_server.running() as hub:
        hub.models = {alpaca_eval.DATASET: {"c" * 40: questions}}
        asked = ["scripts/evaluate.sh", "--suite=alpaca_eval", f"--model={model}", f"--judge_url={url}"]
        asked += ["--engine=transformers", "--maxlen=6", "--gpus=none"]
        said = tiny.succeed(*asked, **{**hub.env, "HF_HOME": str(here / "home")})
    assert {one["top_logprobs"] for one in server.asked} == {5}
    return said, names


def judged(prompt: str, annotations: dict[str, Annotation], saw: Callable[[str], None]) -> dict[str, Any]:
    """The judge's completion: the published one where there is one, else one that means the annotation's preference."""
    (instruction,) = re.findall(r'"instruction": """(.*?)""",\n}\n\n## Model Outputs', prompt, re.DOTALL)
    annotation = annotations[instruction]
    theirs = {name for name in "mM" if re.findall(ANSWER.format(name), prompt, re.DOTALL)[0] == annotation["output_1"]}
    (ours,) = {"m", "M"} - theirs
    saw(ours)
    if raw := annotation.get("raw_completion"):
        return says("", *({top["token"]: top["logprob"] for top in raw["logprobs"]["content"][0]["top_logprobs"]},))
    if annotation["preference"] is None:
        return says("Both", {"Both": -0.1})
    # other tokens have a tenth; a token that cannot come is not among the likeliest
    p = {ours: annotation["preference"] - 1, "mM".replace(ours, ""): 2 - annotation["preference"]}
    return says("", {"The": math.log(0.1), **{name: math.log(0.9 * share) for name, share in p.items() if share > 0}})


def gamed(questions: int) -> str:
    """The file for the win rate at equal length, made up: how gamed answers fare, how difficult each question is."""
    lines = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for model, length in (("concise", -1), ("verbose", 1)):
        lines += [f"{model},{n},{0.3 + n % 5 / 10},{length},{n % 7 / 7},False" for n in range(questions)]
    return "\n".join(lines) + "\n"


# beside which figures SPPO's own rows stand


def run_of(here: Path, first: str) -> Order:
    """The suite for iteration 3 of a run that began with the model `first`."""
    (here / "iter1").mkdir(parents=True)
    (here / "iter1/recipe.yaml").write_text(f"model: {first}\n")
    return Order("alpaca_eval", Recipe(model=str(here / "iter3/model")), here, judge_model=alpaca_eval.JUDGE)


@pytest.mark.parametrize(
    ("first", "win_rate", "at_equal_length"),
    [
        (MISTRAL, 32.2, 30.5),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 39.7, 38.6),
        ("google/gemma-2-9b-it", 48.2, 54.0),
    ],
)
def test_the_leaderboards_row_is_of_the_model_that_began_as_the_run_did(
    first: str, win_rate: float, at_equal_length: float, tmp_path: Path
) -> None:
    (found,) = alpaca_eval.published_figures(run_of(tmp_path / "mine", first)).values()
    assert round(found["win_rate_percent"], 1) == win_rate
    assert round(found["length_controlled_win_rate_percent"], 1) == at_equal_length


def test_no_published_figures_stand_beside_what_cannot_be_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    order = run_of(tmp_path / "mine", MISTRAL)
    for other in ({"questions": "my.jsonl"}, {"judge_model": "my-judge"}):
        assert alpaca_eval.published_figures(dataclasses.replace(order, **other)) == {}
        assert f"the published figures of {ROW} cannot be compared with these" in capsys.readouterr().out
    assert alpaca_eval.published_figures(dataclasses.replace(order, mixture=("m",))) == {}
    (tmp_path / "mine/iter1/recipe.yaml").unlink()
    assert alpaca_eval.published_figures(order) == {}
    # another model; a directory here that has a model's name; and a Hub id that is a directory here
    for name, first in {"a": "my-org/my-model", "b": f"models/{MISTRAL}", "c": "google/gemma-2-9b-it"}.items():
        order = run_of(tmp_path / name, first)
        if name == "c":
            assert alpaca_eval.published_name(order)
            (tmp_path / first).mkdir(parents=True)
        assert alpaca_eval.published_figures(order) == {}
    assert capsys.readouterr().out == ""


def test_a_released_model_outside_a_run_is_known_by_its_name_on_the_hub(tmp_path: Path) -> None:
    """The leaderboard's Mistral is not the third iteration of the paper, which has figures of its own there."""

    def name_of(model: str) -> str:
        return alpaca_eval.published_name(Order("alpaca_eval", Recipe(model=model), tmp_path))

    assert name_of("UCLA-AGI/Mistral7B-PairRM-SPPO") == ROW
    assert name_of("UCLA-AGI/Llama-3-Instruct-8B-SPPO-Iter3") == "SPPO-Llama-3-Instruct-8B-PairRM"
    assert name_of("UCLA-AGI/Gemma-2-9B-It-SPPO-Iter3") == "SPPO-Gemma-2-9B-It-PairRM"
    for other in ("UCLA-AGI/Mistral7B-PairRM-SPPO-Iter3", MISTRAL, "my-org/SPPO-Mistral7B-PairRM"):
        assert name_of(other) == ""
