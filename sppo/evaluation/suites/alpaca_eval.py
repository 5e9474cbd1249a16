"""AlpacaEval 2: how often a judge prefers our answers to GPT-4 Turbo's, by the alpaca-eval package.

The judge's prompts, the order of the two answers, parsing and win rates are the package's. Ours are the engine that
draws the answers, and the connection to the judge, which keeps each judgement.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sppo.command.errors import SPPOError
from sppo.evaluation.suites.suite import (
    Figures,
    Order,
    SuiteJudge,
    draw_answers,
    figures_stage,
    finish,
    hub_files,
    is_iteration,
    read_questions,
)
from sppo.rankers.chat_server import is_logprob
from sppo.recipe import load_recipe
from sppo.schema import content_id
from sppo.store.files import atomic, write_json

JUDGE = "gpt-4-1106-preview"  # the published one
DATASET, REFERENCE, GAMED = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"
ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
FEWEST = 10  # questions for a length-controlled win rate
OUTPUTS, ANNOTATIONS = "model_outputs.json", "annotations.json"
FIGURES = {  # the leaderboard's names, and ours
    "win_rate": "win_rate_percent",
    "standard_error": "win_rate_standard_error",
    "length_controlled_winrate": "length_controlled_win_rate_percent",
    "lc_standard_error": "length_controlled_standard_error",
    "avg_length": "mean_characters",
}
SPPO_ROWS = {  # the leaderboard's rows of SPPO's released models, by the model that each began with
    "mistralai/Mistral-7B-Instruct-v0.2": "SPPO-Mistral7B-PairRM",
    "meta-llama/Meta-Llama-3-8B-Instruct": "SPPO-Llama-3-Instruct-8B-PairRM",
    "google/gemma-2-9b-it": "SPPO-Gemma-2-9B-It-PairRM",
}


def load_questions(order: Order) -> list[dict[str, Any]]:
    """The instructions with the answers to compare with: {instruction, output, generator}.

    Raises SPPOError where they are nowhere, or a row lacks what it must have.
    """
    if not order.questions:
        reference, _ = hub_files(DATASET, "dataset", [REFERENCE, GAMED])
        return json.loads(reference.read_text(encoding="utf-8"))
    rows = read_questions(Path(order.questions))
    for number, row in enumerate(rows, 1):
        if missing := [key for key in ("instruction", "output") if not isinstance(row.get(key), str)]:
            raise SPPOError(f"--questions {order.questions}, question {number}: no {' and no '.join(missing)} in it")
    if len({row["instruction"] for row in rows}) < len(rows):
        raise SPPOError(f"--questions {order.questions}: an instruction is there twice")
    return [{"generator": "reference", **row} for row in rows]


def run_suite(order: Order, rows: list[dict[str, Any]], judge: SuiteJudge) -> None:
    """Answer, let the judge compare, and write figures.json, model_outputs.json and annotations.json."""
    import alpaca_eval
    import pandas as pd
    from alpaca_eval import annotators

    logging.getLogger().setLevel(logging.WARNING)  # the package sets it to INFO
    asked = {f"{n:04d}": [{"role": "user", "content": row["instruction"]}] for n, row in enumerate(rows)}
    drawn = draw_answers(order, asked, "alpaca_eval")
    outputs = [
        {"instruction": row["instruction"], "output": text, "generator": order.name, "dataset": row.get("dataset", "")}
        for row, text in zip(rows, drawn.values(), strict=True)
    ]
    inputs = {"answers": content_id(outputs), "reference": content_id(rows)}
    stage = figures_stage(order, inputs, {"annotator": ANNOTATOR}, (OUTPUTS, ANNOTATIONS))
    if not stage.make_ready(order.overwrite):
        return
    published = published_figures(order)
    stage.begin()
    write_json(order.out / OUTPUTS, outputs)

    class Annotator(annotators.PairwiseAnnotator):
        """The package's, which asks `judge` and keeps no cache of its own."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(caching_path=None, **settings)
            for single in self.annotators.values():
                single.fn_completions = completions(judge)

    metric: Any = "get_length_controlled_winrate"  # the package's, for its own questions
    metric_settings: dict[str, Any] = {"save_weights_dir": None}
    if order.questions:
        metric, metric_settings = length_controlled, {}
    with contextlib.redirect_stdout(None):
        made = alpaca_eval.evaluate(
            model_outputs=outputs,
            reference_outputs=rows,
            annotators_config=ANNOTATOR,
            name=order.name,
            Annotator=Annotator,
            annotation_kwargs={"chunksize": None},
            precomputed_leaderboard=None,
            output_path=None,
            fn_metric=metric,
            metric_kwargs=metric_settings,
            sort_by="win_rate",
            is_return_instead_of_print=True,
        )
    assert made is not None  # because of is_return_instead_of_print
    table, annotations = made[0], pd.DataFrame(made[1])
    with atomic(order.out / ANNOTATIONS) as temporary:
        annotations.to_json(temporary, orient="records", indent=1, force_ascii=False)

    judged = len(annotations.dropna(subset=["preference"]))
    if judged < len(rows):
        print(f"alpaca_eval: {len(rows) - judged} of {len(rows)} questions have no judgement and are left out")
    figures = {**_figures(table.loc[order.name]), "judged": judged, "not_judged": len(rows) - judged}
    finish(order, stage, figures, len(rows), published=published)
    judge.forget()


def _figures(row: Any) -> Figures:
    """A row of a leaderboard of alpaca-eval, by our names. A figure that it lacks is left out, and so is NaN."""
    found = row.dropna()
    return {ours: float(found[theirs]) for theirs, ours in FIGURES.items() if theirs in found}


def published_figures(order: Order) -> dict[str, Figures]:
    """The published figures that may stand beside those of order's model, by the leaderboard's name of their model.

    {} where there are none, and where they cannot be compared; that is said.
    """
    import pandas as pd
    from alpaca_eval.constants import ALPACAEVAL_2_LEADERBOARD_PATHS

    name = published_name(order)
    if not name:
        return {}
    if order.questions or order.judge_model != JUDGE:
        print(f"alpaca_eval: the published figures of {name} cannot be compared with these, and are not shown: "
              f"{JUDGE} judged it, on the suite's own questions")  # fmt: skip
        return {}
    table = pd.read_csv(ALPACAEVAL_2_LEADERBOARD_PATHS / f"{ANNOTATOR}_leaderboard.csv", index_col=0)
    return {name: _figures(table.loc[name])}


def published_name(order: Order) -> str:
    """The leaderboard's name of SPPO's released model that order's model can be compared with; "" where there is none.

    That is the one that began with the same model as order's run. Outside a run it is the released model itself. Models
    are known by their names on the Hub alone: a local directory may hold anything, whatever it is called.
    """
    from alpaca_eval.constants import MODELS_CONFIG_DIR
    from alpaca_eval.utils import load_configs

    if order.mixture:
        return ""
    here = Path(order.recipe.model).absolute()
    if is_iteration(here):
        first = here.parents[1] / "iter1" / "recipe.yaml"
        model, names = load_recipe(first).model if first.exists() else "", SPPO_ROWS
    else:
        configs = [load_configs(name, MODELS_CONFIG_DIR)[name] for name in SPPO_ROWS.values()]
        released = [config["completions_kwargs"]["model_name"] for config in configs]
        model, names = order.recipe.model, dict(zip(released, SPPO_ROWS.values(), strict=True))
    return "" if Path(model).is_dir() else names.get(model, "")


def completions(judge: SuiteJudge) -> Callable[..., dict[str, list[Any]]]:
    """What alpaca-eval calls with the judge's prompts: it gives the answers, from our journal or from the server."""
    from alpaca_eval.utils import prompt_to_chatml

    def ask(prompts: list[str], model_name: str, **settings: Any) -> dict[str, list[Any]]:
        requests = [{"messages": prompt_to_chatml(prompt.strip()), **settings} for prompt in prompts]
        choices = judge.choices(requests, has_letter, "log-probs of m and M")
        return {"completions_all": [choice if has_letter(choice) else {} for choice in choices]}

    return ask


def has_letter(choice: dict[str, Any]) -> bool:
    """Whether the judge's first token has valid log-probs, and one of m or M, the names of the two answers."""
    places = (choice.get("logprobs") or {}).get("content") or [{}]
    tops = places[0].get("top_logprobs") or []
    return any(top.get("token") in ("m", "M") for top in tops) and all(is_logprob(top.get("logprob")) for top in tops)


def length_controlled(annotations: Any) -> dict[str, float]:
    """alpaca-eval's win rates for questions of one's own.

    The length-controlled one takes 10 questions or more. It is alpaca-eval's logistic regression on the difference of
    lengths, without the term for the instruction's difficulty, which is known only for the suite's own 805.
    """
    import pandas as pd
    from alpaca_eval.metrics import get_winrate, glm_winrate

    found = get_winrate(annotations)
    frame = pd.DataFrame(annotations).dropna(subset=["preference"])
    apart = (frame["output_1"].str.len() - frame["output_2"].str.len()).astype(float)
    if len(frame) < FEWEST or not apart.std():
        return found
    data = pd.DataFrame({"std_delta_len": apart / apart.std(), "not_gamed_baseline": True})
    data["preference"] = frame["preference"].astype(float) - 1
    equal = data[["not_gamed_baseline"]].assign(std_delta_len=0.0)
    formula = glm_winrate.GLM_INFO["length_controlled_minimal"]["formula"]
    train, test = glm_winrate.make_dmatrix_for_model(data, equal, formula)
    model = glm_winrate.fit_LogisticRegressionCV(train, "preference", n_splits=5)
    # at equal length the prediction is the same for all questions, so it has no standard error over them
    return found | {"length_controlled_winrate": 100 * model.predict_proba(test)[:, 1].mean()}
